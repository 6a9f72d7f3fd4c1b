"""OpenTelemetry: a span for every wait, events on the span that was held up, and metrics.

A request waits in the context in which the program made it, so its events are added where they
belong: to the span of the training step, and as a child of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from opentelemetry import metrics, trace

import tinker_routefix
from tinker_routefix import events


def export() -> Callable[[], None]:
    """Report to the providers that are set, from now on; returns a function that ends it."""
    tracer, meter = trace.get_tracer("tinker_routefix"), metrics.get_meter("tinker_routefix")
    refused = meter.create_counter("routefix.refused", description="404s of the gateway")
    seconds = meter.create_histogram("routefix.wait", unit="s", description="until they ended")

    def tell(event: events.Event) -> None:
        fields = asdict(event)
        at = int(fields.pop("at") * 1e9)
        attributes = {f"routefix.{name}": field for name, field in fields.items() if field}
        span = trace.get_current_span()
        if span.is_recording():  # the program may have made the request outside of any
            span.add_event(event.name, attributes, timestamp=at)
        if isinstance(event, events.Refused):
            refused.add(1, {"routefix.job": event.job})
        # FailedFast is a GivenUp.
        elif isinstance(event, events.Recovered | events.GivenUp | events.Uncertain):
            seconds.record(event.seconds, {"routefix.outcome": event.name})
            began = at - int(event.seconds * 1e9)
            tracer.start_span(event.name, start_time=began, attributes=attributes).end(at)

    return tinker_routefix.subscribe(tell)


if __name__ == "__main__":
    print(__doc__, "Shown with the lab: in a checkout, pip install '.[lab,tinker]'", sep="\n")
    import tinker
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

    from tinker_routefix.lab import Fault, Lab

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
    trace.set_tracer_provider(provider)
    export()
    with Lab() as lab, trace.get_tracer("program").start_as_current_span("connect"):
        lab.fault(Fault(count=3))  # a route that is stale for the first requests
        service = tinker.ServiceClient(base_url=lab.base_url, api_key="tml-lab")
        service.create_lora_training_client(base_model="lab/base").result()  # of 0.38 or newer
