"""Random schedules of faults and of programs, played on the lab with a real tinker.

``model`` says what a schedule is, ``draw`` draws one, ``runner`` plays it on a clock that
runs faster (``clock``), ``judge`` says what is wrong with what came of it. A schedule that
fails is printed as a program, which ``replay`` makes run by itself.
"""
