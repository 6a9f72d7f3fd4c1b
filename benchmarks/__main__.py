"""``python -m benchmarks``: measure, and write down what came out."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from benchmarks import contenders, healthy, leaks, plots, recovery, scale, stampede, suite
from benchmarks.figures import EXACT, FIGURES, Target, targets

BENCHMARKS: dict[str, suite.Benchmark] = {
    "healthy": healthy,
    "recovery": recovery,
    "leaks": leaks,
    "stampede": stampede,
    "scale": scale,
}

_HERE = Path(__file__).parent
_DIGITS = 4
_TOGETHER = "RESULTS.md"


def _facts() -> dict[str, Any]:
    """What has to be known to compare figures; nothing that names the machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{
            name: metadata.version(name)
            for name in ("tinker", "tinker-routefix", "httpx", "tenacity", "wrapt")
        },
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _made(results: dict[str, Any]) -> str:
    facts = results["facts"]
    return (
        f"Made by `{results['command']}` in {results['seconds'] / 60:.0f} minutes, on "
        f"{facts['cpus']} CPUs ({facts['system']}), Python {facts['python']}, "
        f"tinker {facts['tinker']}, tinker_routefix {facts['tinker-routefix']}, {facts['date']}."
    )


def _write(out: Path) -> list[Target]:
    """Write the reports and plots of all results that are there; returns all targets."""
    everything: list[Target] = []
    sections = []
    operations = runs = 0
    for name, benchmark in BENCHMARKS.items():
        path = out / f"{name}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        measured = results["measured"]
        section = benchmark.report(measured)
        plots.save(benchmark.draw(measured), out / f"{name}.svg")
        body = (
            f"{_made(results)}\n{section.text}\n"
            f"![{benchmark.TITLE}]({name}.svg)\n\nFigures to reach:\n\n"
            f"{targets(section.targets)}"
        )
        (out / f"{name}.md").write_text(f"# {benchmark.TITLE}\n\n{body}", encoding="utf-8")
        sections.append(f"- [{benchmark.TITLE}]({out.name}/{name}.md): {_made(results)}")
        everything += section.targets
        shims = [
            row
            for rows in measured.values()
            for row in rows
            if row.get("contender") == contenders.SHIM and "twice" in row
        ]
        operations += suite.wrong(shims)
        runs += len(shims)
    everything.insert(
        0,
        Target(
            EXACT,
            "all benchmarks",
            f"{operations} in {runs:,} runs",
            operations == 0,
        ),
    )
    text = (
        "# Results\n\n"
        "Written by the benchmarks; what they do, and what is to be said of the figures that were\n"
        "not reached, is in [README.md](README.md).\n\n"
        f"{targets(everything)}\n" + "\n".join(sections) + "\n"
    )
    (out.parent / _TOGETHER).write_text(text, encoding="utf-8")
    return everything


@click.command(context_settings={"max_content_width": 100})
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--repeat", type=click.IntRange(1), help="How often; each has its own default.")
@click.option("--quick", is_flag=True, help="Two minutes, to see that all of it works.")
@click.option("--redraw", is_flag=True, help="Only write reports and plots anew.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=_HERE / "results",
    help="Where to write; default: benchmarks/results.",
)
def main(names: tuple[str, ...], repeat: int | None, quick: bool, redraw: bool, out: Path) -> None:
    """Run benchmarks (default: all) and write their results, tables and plots."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def say(what: str) -> None:
        click.echo(f"{time.monotonic() - began:6.0f} s  {what}", err=True)

    for name in () if redraw else names or BENCHMARKS:
        # A fresh one for each, so that none has to do with what another left in it.
        with contenders.stage() as stage:
            since = time.monotonic()
            measured = BENCHMARKS[name].measure(stage, suite.Plan(repeat, quick), say)
        results = {
            "command": " ".join(
                [
                    "python -m benchmarks",
                    *names,
                    *([f"--repeat {repeat}"] if repeat else []),
                    *(["--quick"] if quick else []),
                ]
            ),
            "facts": _facts(),
            "seconds": round(time.monotonic() - since),
            "measured": measured,
        }
        # A line for each run: readable, and a diff says which.
        lines = json.dumps({**_rounded(results), "measured": None}, indent=1)
        rows = ",\n".join(
            f'  "{kind}": [\n'
            + ",\n".join(f"   {json.dumps(_rounded(row))}" for row in rows)
            + "\n  ]"
            for kind, rows in measured.items()
        )
        text = lines.replace('"measured": null', f'"measured": {{\n{rows}\n }}')
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    for target in _write(out):
        verdict = "reached" if target.reached else "NOT"
        click.echo(
            f"{verdict:<8} {target.what} ({target.where}): {target.measured}; "
            f"at most {FIGURES[target.what]}"
        )


if __name__ == "__main__":
    main()
