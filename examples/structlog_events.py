"""structlog: the shim's log lines as records with fields, like the program's own.

Nothing is subscribed to: the fields of every event are in its log line already.
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

import tinker_routefix  # noqa: F401 - the one line


def flatten(_logger: WrappedLogger, _method: str, record: EventDict) -> EventDict:
    """Call `routefix_job` just `job`, and the event by its name instead of its sentence."""
    if "routefix_event" in record:
        record["message"] = record["event"].removeprefix(f"{record['routefix_event']}: ")
    return {name.removeprefix("routefix_"): value for name, value in record.items()}


def formatter() -> logging.Formatter:
    """For a handler of the root logger; structlog's own records can share it."""
    foreign: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso"),
        flatten,
    ]
    keep = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=foreign, processors=[keep, structlog.processors.JSONRenderer()]
    )


if __name__ == "__main__":
    print(__doc__, "Shown with the lab: in a checkout, pip install '.[lab,tinker]'", sep="\n")
    import tinker

    from tinker_routefix.lab import Fault, Lab

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    with Lab() as lab:
        lab.fault(Fault(count=3))  # a route that is stale for the first requests
        service = tinker.ServiceClient(base_url=lab.base_url, api_key="tml-lab")
        service.create_lora_training_client(base_model="lab/base").result()  # of 0.38 or newer
