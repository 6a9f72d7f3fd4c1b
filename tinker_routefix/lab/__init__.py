"""A gateway that loses routes, on loopback: what the demo, the tests and the benchmarks run on.

It is a real HTTP server with a control plane, gateway replicas and trainers, whose faults are
scripted and whose ledger says what the trainers carried out. It uses neither tinker nor the shim,
and the shim does not use it; but importing any part of ``tinker_routefix`` switches the shim on,
unless ``TINKER_ROUTEFIX=0`` is set. It needs the ``lab`` extra.
"""

from tinker_routefix.lab._faults import GATEWAY_404, Answer, Exchange, Fault
from tinker_routefix.lab._gateway import ControlPlane
from tinker_routefix.lab._ledger import Execution, Ledger
from tinker_routefix.lab._server import Lab
from tinker_routefix.lab._trainer import KINDS

__all__ = [
    "GATEWAY_404",
    "KINDS",
    "Answer",
    "ControlPlane",
    "Exchange",
    "Execution",
    "Fault",
    "Lab",
    "Ledger",
]
