"""What a process says of itself at its end, and what the shim does once a gateway is cured.

Cured, a gateway retries its lookup itself, answers 503 with `route_not_ready`, or tells a stale
route from a job that is gone. Then the shim must change nothing, and be easy to see as idle.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

import tinker_routefix
from tests import programs
from tests.conftest import run_python
from tests.programs import connect, exact, forward_backward, train
from tinker_routefix import _report
from tinker_routefix._counters import Counters
from tinker_routefix.lab import Answer, Fault, Lab

MakeLab = Callable[..., Lab]
Plain = Callable[[], AbstractContextManager[None]]

NOT_READY = Answer(503, {"error": "try again", "queue_state": "route_not_ready"})
STALE = Answer(404, {"error": {"message": "the route is stale", "code": "ROUTE_STALE"}})

# --- What a process says at its end ------------------------------------------------------

PROGRAM = """
import logging, sys
logging.basicConfig(level="INFO", format="%(levelname)s %(name)s %(message)s")
logging.getLogger("httpx").disabled = True
import tinker_routefix
from tests.programs import connect, forward_backward
client = connect(sys.argv[1])
try:
    forward_backward(client).result(60)
except Exception as error:
    print(type(error).__name__)
"""

TRANSPORT = "httpx"
"""What the labs tell tinker to use. With pyqwest a process, also one of plain tinker, now and then
aborts when it ends: less than one in a hundred."""


def last_words(lab: Lab, **environment: str) -> list[str]:
    done = run_python(PROGRAM, lab.base_url, TINKER_TELEMETRY="0", **environment)
    assert done.returncode == 0, done.stderr
    marks = ("INFO tinker_routefix process.", "WARNING tinker_routefix process.")
    return [line.partition(": ")[2] for line in done.stderr.splitlines() if line.startswith(marks)]


def test_final_report_after_a_recovered_404_counts_it(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.fault(Fault(kinds=["forward_backward"], count=2))
    (line,) = last_words(lab)
    assert line.startswith("requests got 2 gateway 404s on 1 job, all recovered, longest wait ")
    exact(lab, gradients=1, optim_steps=0)


def test_final_report_after_a_404_at_warm_up_counts_it(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.fault(Fault(kinds=["get_info"], count=1))
    (line,) = last_words(lab)
    assert line.startswith("requests got 1 gateway 404 on 1 job, all recovered, longest wait ")


def test_final_report_after_a_failed_request_counts_it(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.fault(Fault(kinds=["forward_backward"]))
    lab.control_plane.state = "JOB_STATE_DELETED"
    (line,) = last_words(lab)
    assert line.startswith("requests got 1 gateway 404 on 1 job, 1 failed fast, longest wait ")


@pytest.mark.parametrize("switch", ["0", "1"])
def test_final_report_of_a_healthy_process_is_silent(make_lab: MakeLab, switch: str) -> None:
    assert not last_words(make_lab(), TINKER_ROUTEFIX=switch)


@pytest.mark.parametrize(
    ("counters", "text"),
    [
        (
            [Counters(refused=14, recovered=5, longest_wait=3.21)],
            "14 gateway 404s on 1 job, all re",
        ),
        (
            [Counters(refused=3, recovered=1, longest_wait=1.0), Counters(refused=1, given_up=2)],
            "4 gateway 404s on 2 jobs, 1 recovered, 2 given up, longest wait 1.0 s",
        ),
        ([Counters(refused=2, cancelled=1)], "1 job, 1 cancelled, longest wait 0.0 s"),
        ([Counters(refused=2)], "1 job, none recovered, longest"),
    ],
)
def test_final_report_sums_up_all_outcomes(counters: list[Counters], text: str) -> None:
    assert text in _report.report(counters)


def test_cancelled_request_is_counted_as_cancelled(make_lab: MakeLab) -> None:
    import asyncio

    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["capabilities"]))

    async def take_back(http: Any) -> None:
        sent = asyncio.ensure_future(
            http.get("/api/v1/get_server_capabilities", cast_to=object, options={})
        )
        while not programs.job_of(lab).refused:  # noqa: ASYNC110 - a counter tells nobody
            await asyncio.sleep(0.01)
        sent.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sent

    programs.on_loop(client, take_back)
    assert programs.job_of(lab).cancelled == 1
    assert programs.job_of(lab).recovered == 0


# --- Cures -------------------------------------------------------------------------------


def sent_by_the_program(lab: Lab) -> list[tuple[str, int | None]]:
    """All that has to do with training, in the order in which it came, with its answer."""
    ours = ("get_info", "capabilities", "control_plane", "heartbeat", "telemetry", "healthz")
    return [(one.kind, one.status) for one in lab.exchanges if one.kind not in ours]


def compare(make_lab: MakeLab, plain: Plain, cured: Callable[[Lab], object]) -> Lab:
    """The same requests with the same answers, with the shim and without."""

    def run(lab: Lab) -> list[tuple[str, int | None]]:
        client = connect(lab.base_url)
        cured(lab)
        train(client, 2)
        exact(lab, gradients=2, optim_steps=2)
        return sent_by_the_program(lab)

    with plain():
        expected = run(make_lab())
    lab = make_lab()
    assert run(lab) == expected
    job = programs.job_of(lab)
    assert (job.refused, job.replays, job.questions) == (0, 0, 0)
    assert tinker_routefix.status().last_intervention is None
    return lab


def test_gateway_that_retries_its_lookup_leaves_the_shim_idle(
    make_lab: MakeLab, plain: Plain
) -> None:
    """It is late, and that is all."""
    lab = compare(
        make_lab,
        plain,
        lambda lab: lab.fault(Fault(kinds=["forward_backward"], answer=None, delay=1, count=1)),
    )
    assert programs.job_of(lab).gateway_fix is None


@pytest.mark.parametrize("kind", ["forward_backward", "poll"])
def test_503_route_not_ready_leaves_the_shim_idle(
    make_lab: MakeLab, plain: Plain, kind: str
) -> None:
    lab = compare(
        make_lab, plain, lambda lab: lab.fault(Fault(kinds=[kind], answer=NOT_READY, count=2))
    )
    # tinker repeats a submission below where the shim stands, and a poll above it.
    assert programs.job_of(lab).gateway_fix == ("503 route_not_ready" if kind == "poll" else None)


def test_warm_up_with_503_route_not_ready_ends(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.fault(Fault(kinds=["get_info", "capabilities"], answer=NOT_READY, count=3))
    train(connect(lab.base_url), 1)
    exact(lab, gradients=1, optim_steps=1)
    assert programs.job_of(lab).gateway_fix == "503 route_not_ready"
    assert programs.job_of(lab).last_intervention is None


def test_503_route_not_ready_releases_no_waiter(make_lab: MakeLab) -> None:
    """It is an answer, but not one that shows that the route is there."""
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["forward_backward"], seconds=3))
    lab.fault(Fault(kinds=["get_info", "capabilities"], answer=NOT_READY, seconds=3))
    forward_backward(client).result(programs.PATIENCE)
    exact(lab, gradients=1, optim_steps=0)
    # Released by each of the prober's 503s it would have been more.
    assert programs.job_of(lab).replays <= 3
    assert programs.job_of(lab).recovered == 1


def test_404_with_a_code_of_its_own_for_a_stale_route_is_survived(
    make_lab: MakeLab, plain: Plain
) -> None:
    """An SDK that does not know the code treats it as fatal, so the shim is needed."""

    def run(lab: Lab) -> None:
        client = connect(lab.base_url)
        lab.fault(Fault(kinds=["forward_backward"], answer=STALE, count=2))
        train(client, 1)

    with plain(), pytest.raises(Exception, match="ROUTE_STALE"):
        run(make_lab())
    lab = make_lab()
    run(lab)
    exact(lab, gradients=1, optim_steps=1)
    assert programs.job_of(lab).gateway_fix is None


def test_gone_job_fails_fast_and_shows_no_fixed_gateway(make_lab: MakeLab, plain: Plain) -> None:
    def run(lab: Lab) -> tuple[BaseException, float]:
        client = connect(lab.base_url)
        lab.end_job()
        began = time.monotonic()
        with pytest.raises(Exception) as caught:
            forward_backward(client).result(programs.PATIENCE)
        return programs.gateway_404(caught.value), time.monotonic() - began

    with plain():
        expected, _ = run(make_lab())
    lab = make_lab()
    error, seconds = run(lab)
    assert type(error) is type(expected)
    assert seconds < 10
    # It says nothing of a stale route: the code is the one for a job that is gone.
    assert programs.job_of(lab).gateway_fix is None


def test_final_report_after_503_route_not_ready_says_the_shim_can_go(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.fault(Fault(kinds=["poll"], answer=NOT_READY, count=1))
    (line,) = last_words(lab)
    assert "503 route_not_ready" in line
    assert "tinker_routefix can go now: delete the import" in line
    exact(lab, gradients=1, optim_steps=0)


def test_half_fixed_gateway_is_not_reported_as_fixed() -> None:
    words = _report.retirement(needed=True)
    assert "can go once it does so for all, so that no 404 is received any more: delete" in words
