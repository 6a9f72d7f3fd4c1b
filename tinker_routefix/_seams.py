"""Where tinker is wrapped: which attribute of which module, by which function of ours.

One table of data; ``_patching`` puts it into force. Named tuples, because this module is part of
every start: a frozen dataclass takes ten times as long to define.
"""

from __future__ import annotations

from typing import NamedTuple


class Seam(NamedTuple):
    """One attribute that is wrapped."""

    module: str
    attribute: str
    wrapper: str
    """The function that stands in front of it, as ``module:function`` of this package."""
    purpose: str
    coroutine: bool
    """Whether it must be a coroutine function."""
    parameters: tuple[str, ...] = ()
    """Parameters that the wrapper relies on."""


class Sdk(NamedTuple):
    """A set of seams that is wrapped all or none."""

    name: str
    distribution: str
    """Whose release it is, for what is said about it."""
    seams: tuple[Seam, ...]
    optional: bool = False
    """Where it does not fit, the rest still does its work: not worth a warning."""


def _seams(package: str, client: str) -> tuple[Seam, ...]:
    return (
        Seam(
            f"{package}.lib.internal_client_holder",
            "ClientConnectionPool.aclient",
            "_clients:lend_client",
            "every request borrows its client here: tells which belongs to which pool and job",
            coroutine=False,
        ),
        Seam(
            f"{package}._client",
            f"{client}.request",
            "_requests:guard_request",
            "every request passes: a gateway 404 is replayed once it is known that the job runs",
            coroutine=True,
            parameters=("cast_to", "options"),
        ),
        Seam(
            f"{package}.lib.internal_client_holder",
            "InternalClientHolder.__init__",
            "_connecting:connect_service",
            "what a service client sends while it connects shares one budget",
            coroutine=False,
        ),
        Seam(
            f"{package}.lib.internal_client_holder",
            "InternalClientHolder.execute_with_retries",
            "_requests:follow_submission",
            "one call is one submission with all of its tries: nothing is replayed once one of "
            "them may have been carried out",
            coroutine=True,
        ),
        Seam(
            f"{package}._client",
            f"{client}._sleep_for_retry",
            "_requests:note_try",
            "runs between two tries of a request: tells how the one before it ended",
            coroutine=True,
            parameters=("options", "response"),
        ),
        Seam(
            f"{package}.lib.api_future_impl",
            "_APIFuture._result_async",
            "_futures:await_result",
            "names polls for the log, and warms the route up before a new model is returned",
            coroutine=True,
        ),
    )


TINKER = _seams("tinker", "AsyncTinker")
VENDORED = _seams("fireworks.training.sdk._core", "AsyncTrainingHTTPClient")
"""The renamed copy of tinker in fireworks-ai 1.2.25 and later."""
MANAGER = (
    Seam(
        "fireworks.training.sdk.trainer",
        "TrainerJobManager.__init__",
        "_manager:note_manager",
        "knows where the control plane of a gateway is, and its headers and TLS verification",
        coroutine=False,
    ),
)

SDKS = (
    Sdk("tinker", "tinker", TINKER),
    Sdk("fireworks-ai's copy of tinker", "fireworks-ai", VENDORED),
    Sdk("fireworks-ai's job manager", "fireworks-ai", MANAGER, optional=True),
)
