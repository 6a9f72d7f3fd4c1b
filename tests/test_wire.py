"""Through real nginx and HAProxy, over TLS 1.3 and HTTP/2: plain tinker, then the shim.

HAProxy stands in front, in TCP mode (a connection stays with a replica) or in HTTP mode (every
request may go to another one); behind it nginx as the gateway's replicas, behind those the lab,
whose gateway never refuses and whose ledger says what was carried out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import tinker

import tinker_routefix
from tests import programs
from tests.common import until
from tests.programs import connect, exact, forward_backward, optim_step, train
from tests.wire import servers
from tests.wire.delay import delayed
from tests.wire.servers import Balancer, Replica
from tinker_routefix.lab import GATEWAY_404, Answer, Fault, _tls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.wire.servers import Mode
    from tinker_routefix.lab import Exchange, Lab

    MakeWire = Callable[..., "Wire"]
    Both = Callable[..., "tuple[Run, Run]"]
    Program = Callable[["Wire"], None]

pytestmark = [
    pytest.mark.skipif(
        bool(servers.missing()),
        reason=f"{' and '.join(servers.missing())} not found: apt-get install nginx-light haproxy",
    ),
    pytest.mark.timeout(300),
]

MODES: tuple[Mode, ...] = ("tcp", "http")


@dataclasses.dataclass
class Wire:
    """The way from a program to the lab."""

    lab: Lab
    replicas: list[Replica]
    balancer: Balancer
    clients: list[Any] = dataclasses.field(default_factory=list)
    timers: list[threading.Timer] = dataclasses.field(default_factory=list)
    before: tuple[int, int] = (0, 0)
    """Before the trouble: connections that were open, and that had been opened."""

    @property
    def url(self) -> str:
        """The base URL of the lab's job."""
        return self.lab.base_url.replace(self.lab.origin, self.balancer.origin)

    def stale(self, *seconds: float, seen: int = 1) -> None:
        """Let the first replicas not know any job, and learn it one by one.

        Args:
            seconds: After so long.
            seen: Count from so many 404s on, however late a program is there.
        """
        awaited = self.count(404) + seen
        stale = list(zip(self.replicas, seconds, strict=False))
        for replica, _ in stale:
            replica.switch("stale")

        def heal() -> None:
            until(lambda: self.count(404) >= awaited)
            began = time.monotonic()
            for replica, healed in stale:
                time.sleep(max(0.0, began + healed - time.monotonic()))
                replica.switch("stale", False)

        self.after(0, heal)

    def after(self, seconds: float, call: Callable[..., Any], *args: Any) -> None:
        """Do something later, in another thread."""
        timer = threading.Timer(seconds, call, args)
        self.timers.append(timer)
        timer.start()

    def connect(self) -> Any:
        """A training client."""
        self.clients.append(connect(self.url))
        return self.clients[-1]

    def close(self) -> None:
        """Before the servers go: heartbeats would be sent to them until the process ends."""
        for timer in self.timers:
            timer.join()
        for client in self.clients:
            client.holder.close()

    def reached(self, kind: str, times: int = 1) -> None:
        """Wait until the lab has been asked for something so often."""
        until(lambda: self.lab.count(kind) >= times)

    def count(self, status: int) -> int:
        """How often the replicas have answered with a status."""
        return sum(one.status == status for one in self.answered())

    def answered(self) -> list[servers.Answered]:
        return [one for replica in self.replicas for one in replica.answered()]

    def connections(self) -> int:
        """How many connections to the balancer are open: only this process has any."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        port = f":{self.balancer.port:04X}"
        return sum(remote.endswith(port) and state == "01" for _, _, remote, state, *_ in rows)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all servers, by the authority of the labs, with its key."""
    path = tmp_path_factory.mktemp("certificate") / "server.pem"
    path.write_bytes(_tls.issue().private_key_and_cert_chain_pem.bytes())
    return path


@pytest.fixture
def make_wire(
    make_lab: Callable[..., Lab],
    certificate: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[MakeWire]:
    """Start everything: the servers' options, those of the lab, and what it is made of."""
    monkeypatch.setenv("SSL_CERT_FILE", str(_tls.ca_file()))
    with contextlib.ExitStack() as started:

        def make(
            mode: Mode,
            transport: str,
            *,
            replicas: int = 2,
            http2: bool = True,
            idle: int = 60,
            moved: str = "/moved",
            **options: Any,
        ) -> Wire:
            if transport == "pyqwest" and mode == "tcp" and _NAMES_HOST_TWICE:
                # In HTTP mode it speaks to HAProxy, which does not mind.
                http2 = False
            config = {"use_pyqwest_transport": transport == "pyqwest"}
            lab = make_lab(config=config, tls=False, poll_seconds=0.3, **options)
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            nginx = [
                started.enter_context(
                    Replica(
                        folder / f"replica{number}",
                        lab=lab.origin,
                        certificate=certificate,
                        gateway_404=json.dumps(GATEWAY_404.body),
                        http2=http2,
                        idle=idle,
                        moved=moved,
                    )
                )
                for number in range(replicas)
            ]
            balancer = Balancer(
                folder / "balancer",
                mode=mode,
                replicas=nginx,
                certificate=certificate,
                ca_file=_tls.ca_file(),
                http2=http2,
                idle=idle,
            )
            wire = Wire(lab, nginx, started.enter_context(balancer))
            started.callback(wire.close)
            return wire

        yield make


@pytest.fixture
def both(
    make_wire: MakeWire,
    plain: Callable[..., Any],
    record_property: Callable[[str, object], None],
) -> Callable[..., tuple[Run, Run]]:
    """Run a program with plain tinker and with the shim, each through servers of its own."""

    def run(program: Program, *where: Any, **options: Any) -> tuple[Run, Run]:
        runs = []
        for shim in (False, True):
            wire = make_wire(*where, **options)
            with contextlib.nullcontext() if shim else plain():
                runs.append(Run(wire, program))
            record_property("wire", f"{'shim ' if shim else 'plain'}  {runs[-1]}")
        return runs[0], runs[1]

    return run


class Run:
    """A program that has run, and what came of it."""

    def __init__(self, wire: Wire, program: Program) -> None:
        self.wire = wire
        self.error: BaseException | None = None
        began = time.monotonic()
        try:
            program(wire)
        except Exception as error:
            self.error = error
        self.seconds = time.monotonic() - began
        self.open, self.opened = wire.connections(), wire.balancer.opened()
        self.done = (wire.lab.ledger.gradients, wire.lab.ledger.optim_steps)

    def __str__(self) -> str:
        outcome = "survived" if self.error is None else type(self.error).__name__
        return (
            f"{outcome:<18} {self.seconds:5.1f} s  gradients, steps {self.done}  404s "
            f"{self.wire.count(404):>3}  connections {self.opened:>3}, {self.open:>2} open"
        )

    def died_of_404(self) -> None:
        """It has ended as it does today: with the gateway's 404."""
        assert self.error is not None, "it survived: there was no race"
        programs.gateway_404(self.error)

    def exact(self, steps: int) -> None:
        """It has gone through to the end, and everything was carried out once."""
        if self.error is not None:
            raise self.error
        exact(self.wire.lab, gradients=steps, optim_steps=steps)


# --- In every run -----------------------------------------------------------------------------


def cold_race(wire: Wire) -> None:
    wire.stale(2.0, 3.0)
    train(wire.connect())


def stale_polls(wire: Wire) -> None:
    client = wire.connect()
    wire.lab.work_seconds = 1.0
    future = forward_backward(client)
    wire.reached("forward_backward")
    wire.stale(2.0, 3.0)
    future.result(programs.PATIENCE)
    optim_step(client).result(programs.PATIENCE)


def stale_submissions(wire: Wire) -> None:
    client = wire.connect()
    wire.stale(2.0, 3.0)
    train(client)


def half_of_the_replicas(wire: Wire) -> None:
    client = wire.connect()
    wire.lab.work_seconds = 0.2
    wire.stale(3.0, 5.0, seen=0)
    train(client, steps=6)


def reload(wire: Wire) -> None:
    client = wire.connect()
    wire.lab.work_seconds = 0.7
    for step in (1, 2):
        futures = [forward_backward(client), optim_step(client)]
        wire.reached("optim_step", step)
        for replica in wire.replicas:
            replica.reload()
        for future in futures:
            future.result(programs.PATIENCE)


def _without_pyqwest() -> str:
    """Why tinker cannot use pyqwest here, if so."""
    config = getattr(tinker.types, "ClientConfigResponse", None)
    if config is None or "use_pyqwest_transport" not in config.model_fields:
        return "this tinker has no second transport"
    import pyqwest
    from tinker import _base_client

    source = inspect.getsource(_base_client._default_pyqwest_transport)
    if (
        "tls_include_system_certs" in inspect.signature(pyqwest.HTTPTransport).parameters
        and "tls_include_system_certs" not in source
    ):
        return "over TLS this tinker needs pyqwest<0.7: with a later one it trusts nobody"
    return ""


def _names_host_twice() -> bool:
    """Whether pyqwest sends a ``host`` header over HTTP/2 as well, which nginx answers with 400."""
    try:
        from pyqwest.httpx import _transport
    except ImportError:
        return False
    return '"host"' not in inspect.getsource(_transport)


_WITHOUT_PYQWEST = _without_pyqwest()
_NAMES_HOST_TWICE = _names_host_twice()

TRANSPORTS = [
    "httpx",
    pytest.param(
        "pyqwest", marks=pytest.mark.skipif(bool(_WITHOUT_PYQWEST), reason=_WITHOUT_PYQWEST)
    ),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("program", [cold_race, stale_polls, stale_submissions])
def test_a_route_that_is_stale_everywhere_ends_plain_tinker_and_not_the_shim(
    both: Both, program: Program, mode: Mode, transport: str
) -> None:
    plain, shim = both(program, mode, transport)
    plain.died_of_404()
    shim.exact(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_half_of_the_replicas_stale_is_survived(both: Both, mode: Mode, transport: str) -> None:
    _, shim = both(half_of_the_replicas, mode, transport, replicas=4)
    shim.exact(6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_graceful_reload_changes_nothing_with_or_without_the_shim(
    both: Both, mode: Mode, transport: str
) -> None:
    for run in both(reload, mode, transport):
        run.exact(2)
        assert run.wire.count(404) == 0


def a_replica_for_good(wire: Wire) -> None:
    client = wire.connect()
    train(client)
    # That which the connection of the next submission leads to.
    for replica in wire.replicas:
        if any(one.path.endswith("/forward_backward") for one in replica.answered()):
            replica.switch("stale")
    train(client, steps=3)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_replica_that_stays_stale_is_left_behind(both: Both, transport: str) -> None:
    """A connection stays with it for good: a replay has to go elsewhere."""
    plain, shim = both(a_replica_for_good, "tcp", transport)
    plain.died_of_404()
    shim.exact(4)
    assert shim.wire.count(404) > 0, "the stale replica was never asked"


IN_FLIGHT = 100
OPENED = 70
"""Connections; 20 to 50 on a machine that does nothing else, and one for each request were 100."""
LEFT_OPEN = 4


def many_polls(wire: Wire) -> None:
    """An outage of about 4 s, of all replicas or of every second request, under many polls."""
    client = wire.connect()
    # No result is ready before it is over.
    over = threading.Event()
    unready = Answer(408, {"type": "try_again", "request_id": "any", "queue_state": "active"})
    wire.lab.fault(
        Fault(kinds=["poll"], at="pod", answer=unready, delay=0.3, when=lambda _: not over.is_set())
    )
    futures = [forward_backward(client) for _ in range(IN_FLIGHT)]
    wire.reached("poll", IN_FLIGHT)
    wire.before = (wire.connections(), wire.balancer.opened())
    wire.stale(*[3.0] * (2 if wire.balancer.mode == "tcp" else 1), seen=IN_FLIGHT)
    wire.timers[-1].join()
    over.set()
    for future in futures:
        future.result(programs.PATIENCE)


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What is closed is closed by somebody, and not when the collector happens to run."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_connections_under_many_polls_are_few_and_none_is_cut_or_left_open(
    make_wire: MakeWire, record_property: Callable[[str, object], None], mode: Mode, transport: str
) -> None:
    if transport == "pyqwest" and mode == "tcp" and _NAMES_HOST_TWICE:
        pytest.skip("HTTP/1.1 only, where every request in flight has a connection")
    # None is closed by the servers, for being idle.
    run = Run(make_wire(mode, transport, idle=600), many_polls)
    record_property("wire", f"shim   {run}")
    wire = run.wire
    if run.error is not None:
        raise run.error
    exact(wire.lab, gradients=IN_FLIGHT, optim_steps=0)
    opened_before, all_before = wire.before
    assert wire.count(404) >= IN_FLIGHT, "there was no outage"
    assert wire.count(499) == 0, "a client was closed with requests on it"
    assert run.opened - all_before <= OPENED
    until(lambda: wire.connections() <= opened_before + LEFT_OPEN)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_tls_and_http2_are_what_is_spoken(make_wire: MakeWire, mode: Mode, transport: str) -> None:
    if transport == "pyqwest" and _NAMES_HOST_TWICE:
        pytest.skip("this pyqwest cannot speak HTTP/2 to nginx: it names the host twice")
    wire = make_wire(mode, transport)
    train(wire.connect())
    exact(wire.lab, gradients=1, optim_steps=1)
    # The shim's own probes are httpx's, without HTTP/2.
    spoken = {one.version for one in wire.answered() if one.path.endswith("/forward_backward")}
    assert spoken == {"HTTP/2.0"}


def test_a_question_over_tls_costs_three_round_trips_and_on_a_kept_connection_one(
    make_wire: MakeWire,
) -> None:
    """What the figures of the benchmarks are counted in."""
    round_trip = 0.2
    wire = make_wire("http", "httpx", replicas=1)
    took = []
    with delayed(wire.balancer.port, round_trip) as port, httpx.Client(timeout=30) as client:
        for _ in range(6):
            began = time.monotonic()
            assert client.get(f"https://127.0.0.1:{port}/v1/accounts").status_code == 200
            took.append((time.monotonic() - began) / round_trip)
    first, *others = took
    assert first >= 3.0
    # The quickest of several: the machine may stand still in any of them.
    assert 1.0 <= min(others) < first


# --- In the wide run --------------------------------------------------------------------------


def deleted_job(wire: Wire) -> None:
    client = wire.connect()
    train(client)
    wire.lab.end_job()
    train(client)


@pytest.mark.wide
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_deleted_job_ends_both_alike(both: Both, mode: Mode, transport: str) -> None:
    plain, shim = both(deleted_job, mode, transport)
    for run in (plain, shim):
        run.died_of_404()
        assert run.done == (1, 1)
    assert type(shim.error) is type(plain.error)
    # Not after the budget.
    assert shim.seconds < plain.seconds + 10


def killed_workers(wire: Wire) -> None:
    client = wire.connect()
    wire.lab.work_seconds = 1.0
    future = forward_backward(client)
    wire.reached("poll:forward_backward")
    for replica in wire.replicas:
        replica.kill_workers()
    future.result(programs.PATIENCE)
    optim_step(client).result(programs.PATIENCE)


def killed_workers_and_stale(wire: Wire) -> None:
    client = wire.connect()
    wire.lab.work_seconds = 1.0
    future = forward_backward(client)
    wire.reached("poll:forward_backward")
    wire.stale(2.0, 3.0)
    for replica in wire.replicas:
        replica.kill_workers()
    future.result(programs.PATIENCE)
    optim_step(client).result(programs.PATIENCE)


def answers_of(status: Any) -> Program:
    def program(wire: Wire) -> None:
        client = wire.connect()
        for replica in wire.replicas:
            replica.switch(status)
            wire.after(1.5, replica.switch, status, False)
        train(client)

    program.__name__ = f"answers_of_{status}"
    return program


def idle(wire: Wire) -> None:
    client = wire.connect()
    for _ in range(2):
        train(client)
        # Longer than the servers keep a connection that is not used.
        time.sleep(2.5)
    train(client)


def cut_body(wire: Wire) -> None:
    client = wire.connect()
    wire.lab.work_seconds = 1.0
    future = forward_backward(client)
    wire.reached("poll:forward_backward")
    for replica in wire.replicas:
        replica.switch("slow")
    until(lambda: delivered(wire) > 0)
    time.sleep(0.2)
    for replica in wire.replicas:
        replica.switch("slow", on=False)
        replica.kill_workers()
    future.result(programs.PATIENCE)
    optim_step(client).result(programs.PATIENCE)
    assert delivered(wire) > 1, "the first result was not cut"


def delivered(wire: Wire) -> int:
    """How often the trainer has returned the first result."""
    ledger = wire.lab.ledger
    return sum(ledger.retrieved(one.request_id or "") for one in ledger.of("forward_backward"))


@pytest.mark.wide
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "program", [killed_workers, *map(answers_of, ("502", "503", "504")), cut_body]
)
def test_what_plain_tinker_survives_the_shim_survives(
    both: Both, program: Program, mode: Mode, transport: str
) -> None:
    for run in both(program, mode, transport):
        run.exact(1)


@pytest.mark.wide
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_run_over_idle_connections_that_are_closed_is_exact(
    both: Both, mode: Mode, transport: str
) -> None:
    for run in both(idle, mode, transport, idle=1):
        run.exact(3)


@pytest.mark.wide
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_workers_that_come_back_with_a_stale_route_end_plain_tinker_and_not_the_shim(
    both: Both, mode: Mode, transport: str
) -> None:
    plain, shim = both(killed_workers_and_stale, mode, transport)
    plain.died_of_404()
    if (mode, transport) == ("tcp", "httpx") and shim.error is not None:
        # httpx does not see that an idle HTTP/2 connection was closed: the optim_step goes out over
        # one, gets no answer, and where tinker's repeat gets to the stale replica nobody can know.
        shim.died_of_404()
        assert tinker_routefix.may_have_been_carried_out(shim.error)
        assert shim.done == plain.done
    else:
        shim.exact(1)


def lost_answer_then_stale(wire: Wire) -> None:
    """As a replica that restarts: the trainer has the request, nginx says 502, then 404."""
    client = wire.connect()

    def stale(_: Exchange) -> bool:
        if not lost.hits:
            wire.stale(*[3.0] * len(wire.replicas))
        return not lost.hits

    lost = Fault(kinds={"forward_backward"}, lost_answer=True, answer=None, when=stale)
    wire.lab.fault(lost)
    train(client)


# The lab does not see nginx's 404: that is judged here, and a second run excuses nothing.
@pytest.mark.flaky(reruns=0)
@pytest.mark.wide
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_lost_answer_and_then_a_404_ends_both_alike(
    both: Both, mode: Mode, transport: str
) -> None:
    plain, shim = both(lost_answer_then_stale, mode, transport)
    for run in (plain, shim):
        run.died_of_404()
        assert 502 in {one.status for one in run.wire.answered()}
        assert run.done == (1, 0), run.wire.lab.ledger.summary()
    assert type(shim.error) is type(plain.error)


def html_404(wire: Wire) -> None:
    client = wire.connect()
    for number, replica in enumerate(wire.replicas):
        replica.switch("html")
        wire.after(2.0 + number, replica.switch, "html", False)
    train(client)


@pytest.mark.wide
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nginxs_own_404_ends_plain_tinker_and_not_the_shim(
    both: Both, mode: Mode, transport: str
) -> None:
    plain, shim = both(html_404, mode, transport)
    assert isinstance(plain.error, tinker.NotFoundError)
    assert "nginx" in plain.error.response.text
    shim.exact(1)


@pytest.mark.wide
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("program", [cold_race, stale_polls, stale_submissions])
def test_a_race_over_connections_that_are_closed_each_time_is_survived(
    both: Both, program: Program, mode: Mode, transport: str
) -> None:
    plain, shim = both(program, mode, transport, http2=False, idle=0)
    plain.died_of_404()
    shim.exact(1)
    answered = [one for one in shim.wire.answered() if "/training/" in one.path]
    assert {one.version for one in answered} == {"HTTP/1.1"}
    assert len({one.connection for one in answered}) == len(answered) or mode == "http"


def moved(wire: Wire) -> None:
    """Every request is redirected within the gateway; the redirect is not there while stale."""
    for replica in wire.replicas:
        replica.switch("moved")
    stale_submissions(wire)


@pytest.mark.wide
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_redirects_are_followed_through_a_race(both: Both, mode: Mode, transport: str) -> None:
    plain, shim = both(moved, mode, transport)
    plain.died_of_404()
    shim.exact(1)
    assert 307 in {one.status for one in shim.wire.answered()}


@pytest.mark.wide
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_404_of_another_origin_is_raised_as_it_is(
    both: Both, make_wire: MakeWire, mode: Mode, transport: str
) -> None:
    """At once over httpx. pyqwest follows redirects by itself and does not say where to."""
    elsewhere = make_wire("tcp", "httpx", replicas=1)
    elsewhere.replicas[0].switch("stale")

    def leads_elsewhere(wire: Wire) -> None:
        client = wire.connect()
        for replica in wire.replicas:
            replica.switch("moved")
        train(client)

    plain, shim = both(leads_elsewhere, mode, transport, moved=elsewhere.balancer.origin)
    for run in (plain, shim):
        run.died_of_404()
        assert run.done == (0, 0)
        assert transport == "pyqwest" or run.wire.lab.count("control_plane") == 0
    assert type(shim.error) is type(plain.error)
