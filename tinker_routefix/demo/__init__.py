"""The demo: one training script, four ways through the same loss of routes.

It is there to be seen and measured: a run that survives can still have trained twice, and
only the ledger on the receiving side tells. Needs tinker and the ``lab`` extra.
"""

from __future__ import annotations

from tinker_routefix.demo import race, report


def run(*, steps: int, seed: int, as_json: bool, tls: bool = False) -> int:
    """Run all acts and print what came of them.

    Returns:
        The exit code: 0 if the shim's run was exact in every act, 1 if not.
    """
    out: report.Report = report.Json() if as_json else report.Screen()
    played: list[tuple[race.Act, list[race.Result]]] = []
    for act in race.ACTS:
        with race.start(act, steps=steps, seed=seed, tls=tls) as runs:
            out.follow(act, runs)
            results = [run.result() for run in runs]
        out.act(act, results)
        played.append((act, results))
    flaws = [
        f"{result.contender} in act {number}: {flaw}"
        for number, (_, results) in enumerate(played, 1)
        for result in results
        if result.shim
        for flaw in result.flaws()
    ]
    out.end(played, flaws, steps=steps, seed=seed)
    return 1 if flaws else 0
