"""Other packages that patch the same functions, in both import orders.

Each case is a program of its own: the other package is set up before the shim or after it,
the race is survived, the other package still sees what it is there to see, and uninstalling
leaves it alone.
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.conftest import run_python

PROGRAM = """
import asyncio, os, sys
{first}
{second}
import tinker_routefix
import httpx
from tests import programs
from tinker_routefix.lab import Fault, Lab

{define}

# The other packages look at httpx; tinker's second transport goes around it.
with Lab(config={{"use_pyqwest_transport": False}}) as lab:
    lab.fault(Fault(kinds=["create_session"], count=2))
    client = programs.connect(lab.base_url)
    lab.fault(Fault(kinds=["poll:forward_backward"], count=2))
    programs.train(client)
    programs.exact(lab, gradients=1, optim_steps=1)
    assert programs.job_of(lab).recovered >= 2, programs.job_of(lab)
    effective()
    tinker_routefix.uninstall()
    lab.fault(Fault(kinds=["optim_step"], count=1))
    try:
        programs.train(client)
    except Exception as error:
        programs.gateway_404(error)
    else:
        raise AssertionError("the shim is still there")
    still_there()
sys.stdout.write("both")
sys.stdout.flush()
os._exit(0)
"""

OTHERS = {
    "opentelemetry.instrumentation.httpx": (
        """
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
spans = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
HTTPXClientInstrumentor().instrument(tracer_provider=provider)
""",
        """
def effective():
    assert len(spans.get_finished_spans()) >= 10

def still_there():
    assert HTTPXClientInstrumentor().is_instrumented_by_opentelemetry
""",
    ),
    "ddtrace": (
        """
os.environ["DD_TRACE_ENABLED"] = "false"
os.environ["DD_INSTRUMENTATION_TELEMETRY_ENABLED"] = "false"
os.environ["DD_REMOTE_CONFIGURATION_ENABLED"] = "false"
import ddtrace
ddtrace.patch(httpx=True, asyncio=True)
""",
        """
def effective():
    assert httpx._datadog_patch

still_there = effective
""",
    ),
    "sentry_sdk": (
        """
import sentry_sdk
from sentry_sdk.integrations.httpx import HttpxIntegration
from sentry_sdk.integrations.asyncio import AsyncioIntegration
import httpx as _httpx
sent = _httpx.AsyncClient.send
sentry_sdk.init(dsn="", integrations=[HttpxIntegration()], traces_sample_rate=1.0)
""",
        """
def effective():
    assert httpx.AsyncClient.send is not sent

still_there = effective
""",
    ),
    "logfire": (
        """
import logfire
logfire.configure(send_to_logfire=False, console=False)
logfire.instrument_httpx()
""",
        """
def effective():
    from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
    assert HTTPXClientInstrumentor().is_instrumented_by_opentelemetry

still_there = effective
""",
    ),
    "nest_asyncio": (
        """
import nest_asyncio
nest_asyncio.apply()
""",
        """
def effective():
    async def outer():
        return asyncio.run(asyncio.sleep(0, "nested"))
    assert asyncio.run(outer()) == "nested"

still_there = effective
""",
    ),
    "tinker": (
        # A cookbook's way to send more with each poll: a class of its own in tinker's place.
        """
import tinker.lib.api_future_impl as futures
polls = []
class Request(futures.FutureRetrieveRequest):
    def __init__(self, **fields):
        polls.append(fields)
        super().__init__(**fields)
futures.FutureRetrieveRequest = Request
""",
        """
def effective():
    assert len(polls) >= 3

def still_there():
    assert futures.FutureRetrieveRequest is Request
""",
    ),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("other", OTHERS)
def test_shim_and_other_patching_package_both_work(other: str, order: str) -> None:
    if importlib.util.find_spec(other.partition(".")[0]) is None or (
        "." in other and importlib.util.find_spec(other.rpartition(".")[0]) is None
    ):
        pytest.skip(f"{other} is not installed: the coexist session of the noxfile does that")
    setup, checks = OTHERS[other]
    shim = "import tinker_routefix"
    first, second = (setup, shim) if order == "before" else (shim, setup)
    ended = run_python(PROGRAM.format(first=first, second=second, define=checks))
    assert (ended.stdout[-4:], ended.returncode) == ("both", 0), ended.stderr[-3000:]
