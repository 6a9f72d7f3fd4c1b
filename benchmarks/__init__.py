"""Benchmarks: plain tinker, the two earlier strategies and the shim, through the same faults.

``python -m benchmarks`` runs them all and writes ``benchmarks/results`` and
``benchmarks/RESULTS.md``; what each of them measures, and how, is in ``benchmarks/README.md``.
"""
