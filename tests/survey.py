"""The tests on every release of tinker, which the matrix has no environments for.

Puts the unpacked wheel of a release in front of one environment, which has the newest one's
dependencies, and runs the tests in a process of their own. pytest collects this file only if it
is named, as `nox -s survey` and `nox -s compat-boundaries` do; for some releases:

    python -m pytest tests/survey.py -k "0.18.0 or 0.26.2"
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import releases as files
from tools import releases as index

RELEASES = files.releases()
MATRIX = files.matrix()
COMPAT = [f"tests/test_{name}.py" for name in MATRIX["files"]["compat"]]
CORE = [f"tests/test_{name}.py" for name in MATRIX["core"]]
# `boundary` selects what `compat` does not run.
KINDS = dict.fromkeys(MATRIX["boundaries"], "-boundary")
KINDS |= dict.fromkeys((*MATRIX["tinkers"], list(RELEASES)[-1]), "-tinker")

ROOT = Path(__file__).parent.parent


def run_tests(release: str, scratch: Path, *options: str) -> None:
    facts = RELEASES[release]
    if facts["needs_grpc"]:
        pytest.importorskip("grpc")
    # Those that import torch name one class of it at import, and the tests use none.
    (scratch / "torch.py").write_text("class Tensor: ...\n")
    path = [str(index.unpacked(index.CACHE, release, offline=False))]
    path += [str(scratch)] if facts["needs_torch"] else []
    path += filter(None, [os.environ.get("PYTHONPATH")])
    # Not the whole of it once more: there it is known what a second run must not excuse.
    reruns = ["--reruns", "1"] if os.environ.get("CI") == "true" else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    # It is no worker itself.
    environment.pop("PYTEST_XDIST_WORKER", None)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *reruns, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = ended.stdout[-20_000:] + ended.stderr[-5_000:]
    # The header that the tests' conftest prints: which release they really run with.
    assert f"with tinker {release}," in ended.stdout, said
    assert ended.returncode == 0, said
    passed, skipped = (
        sum(map(int, re.findall(rf"(\d+) {outcome}", ended.stdout.splitlines()[-1])))
        for outcome in ("passed", "skipped")
    )
    assert passed > 3 * skipped, said


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "release", [pytest.param(name, id=name + KINDS.get(name, "")) for name in RELEASES]
)
def test_release_with_core_tests_passes(release: str, tmp_path: Path) -> None:
    run_tests(release, tmp_path, "-m", "core", *CORE)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("release", [name for name in RELEASES if name in KINDS])
def test_release_where_something_changed_passes_all(release: str, tmp_path: Path) -> None:
    run_tests(release, tmp_path, *COMPAT)
