"""Prometheus: how often a route was stale, how long that held the program up, and when it last was.

A time of the last 404 that stays 0 for weeks, in every process, means that the shim can go.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

import tinker_routefix
from tinker_routefix import events

SECONDS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)


def export(registry: CollectorRegistry = REGISTRY) -> Callable[[], None]:
    """Keep metrics from now on; returns a function that ends it."""
    refused = Counter("routefix_refused", "404s of the gateway", ["job"], registry=registry)
    labels, about = ("what", "outcome"), "From the first 404 of a request to its end, and warm-ups"
    seconds = Histogram("routefix_seconds", about, labels, buckets=SECONDS, registry=registry)
    last = Gauge("routefix_last_404_timestamp_seconds", "0: never", registry=registry)
    last.set_function(lambda: tinker_routefix.status().last_intervention or 0.0)

    def tell(event: events.Event) -> None:
        if isinstance(event, events.Refused):
            refused.labels(event.job).inc()
        elif isinstance(event, events.WarmupEnded):
            seconds.labels("warmup", event.outcome).observe(event.seconds)
        # FailedFast is a GivenUp.
        elif isinstance(event, events.Recovered | events.GivenUp | events.Uncertain):
            outcome = event.name.removeprefix("route.")
            seconds.labels("request", outcome).observe(event.seconds)

    return tinker_routefix.subscribe(tell)


if __name__ == "__main__":
    print(__doc__, "Shown with the lab: in a checkout, pip install '.[lab,tinker]'", sep="\n")
    import tinker
    from prometheus_client import generate_latest

    from tinker_routefix.lab import Fault, Lab

    scraped = CollectorRegistry()
    export(scraped)
    with Lab() as lab:
        lab.fault(Fault(count=3))  # a route that is stale for the first requests
        service = tinker.ServiceClient(base_url=lab.base_url, api_key="tml-lab")
        service.create_lora_training_client(base_model="lab/base").result()  # of 0.38 or newer
    print(generate_latest(scraped).decode())
