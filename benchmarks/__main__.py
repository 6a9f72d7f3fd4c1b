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

from benchmarks import far, healthy, labs, recovery, stampede, suite
from benchmarks.figures import EXACT, FIGURES, Target, targets

BENCHMARKS: dict[str, suite.Benchmark] = {
    "healthy": healthy,
    "recovery": recovery,
    "stampede": stampede,
    "far": far,
}

_HERE = Path(__file__).parent


def _facts() -> dict[str, Any]:
    """What has to be known to compare figures; nothing that names the machine."""
    names = ("tinker", "tinker-routefix", "httpx", "tenacity", "wrapt")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def _rounded(value: Any) -> Any:
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.4g}"))


def _made(results: dict[str, Any]) -> str:
    facts = results["facts"]
    return (
        f"Made by `{results['command']}` in {results['seconds'] / 60:.0f} minutes, on "
        f"{facts['cpus']} CPUs ({facts['system']}), Python {facts['python']}, "
        f"tinker {facts['tinker']}, tinker_routefix {facts['tinker-routefix']}, {facts['date']}."
    )


def _write(out: Path) -> list[Target]:
    """Write the reports of all results that are there; returns all targets."""
    everything: list[Target] = []
    sections = []
    operations = runs = 0
    for name, benchmark in BENCHMARKS.items():
        path = out / f"{name}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        measured = results["measured"]
        text, reached = benchmark.report(measured)
        (out / f"{name}.md").write_text(
            f"# {benchmark.TITLE}\n\n{_made(results)}\n{text}\nFigures to reach:\n\n"
            f"{targets(reached)}",
            encoding="utf-8",
        )
        sections.append(f"- [{benchmark.TITLE}]({out.name}/{name}.md): {_made(results)}")
        everything += reached
        shims = suite.of(measured["runs"], contender=suite.SHIM)
        operations += suite.wrong(shims)
        runs += len(shims)
    exact = Target(EXACT, "all runs", f"{operations} in {runs:,} runs", operations == 0)
    everything.insert(0, exact)
    (out.parent / "RESULTS.md").write_text(
        "# Results\n\n"
        "Written by the benchmarks; what they do, and what is to be said of the figures that were\n"
        "not reached, is in [README.md](README.md).\n\n"
        f"{targets(everything)}\n" + "\n".join(sections) + "\n",
        encoding="utf-8",
    )
    return everything


def _keep(results: dict[str, Any], path: Path) -> None:
    """Write results: a line for each run, which is readable, and a diff says which."""
    measured = {kind: map(json.dumps, _rounded(rows)) for kind, rows in results["measured"].items()}
    kinds = [
        f'  "{kind}": [\n   ' + ",\n   ".join(rows) + "\n  ]" for kind, rows in measured.items()
    ]
    about = json.dumps({**results, "measured": None}, indent=1)
    text = about.replace('"measured": null', '"measured": {\n' + ",\n".join(kinds) + "\n }")
    path.write_text(text + "\n", encoding="utf-8")


@click.command(context_settings={"max_content_width": 100})
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option(
    "--wire", type=click.Choice(list(labs.WIRES)), default=labs.PYQWEST, help="To the lab."
)
@click.option("--repeat", type=click.IntRange(1), help="How often; each has its own default.")
@click.option("--quick", is_flag=True, help="Two minutes, to see that all of it works.")
@click.option("--redraw", is_flag=True, help="Only write reports anew.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=_HERE / "results",
    help="Where to write; default: benchmarks/results, RESULTS.md beside it.",
)
def main(
    names: tuple[str, ...], wire: str, repeat: int | None, quick: bool, redraw: bool, out: Path
) -> None:
    """Run benchmarks (default: all) and write their results and tables."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def say(what: str) -> None:
        click.echo(f"{time.monotonic() - began:6.0f} s  {what}", err=True)

    command = ["python -m benchmarks", *names, *[f"--wire {wire}"] * (wire != labs.PYQWEST)]
    command += [f"--repeat {repeat}"] * bool(repeat) + ["--quick"] * quick
    for name in () if redraw else names or BENCHMARKS:
        # A fresh stage for each, so that none has to do with what another left on it.
        with suite.stage(wire, repeat=repeat, quick=quick, say=say) as stage:
            since = time.monotonic()
            measured = BENCHMARKS[name].measure(stage)
        results = {
            "command": " ".join(command),
            "facts": _facts(),
            "seconds": round(time.monotonic() - since),
            "measured": measured,
        }
        _keep(results, out / f"{name}.json")
    for target in _write(out):
        click.echo(
            f"{'reached' if target.reached else 'NOT':<8} {target.what} ({target.where}): "
            f"{target.measured}; at most {FIGURES[target.what]}"
        )


if __name__ == "__main__":
    main()
