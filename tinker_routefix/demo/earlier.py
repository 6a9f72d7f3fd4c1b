"""Two earlier strategies against stale routes, re-implemented: here for comparison only.

Both wrap the SDK's client and do a whole operation again, dispatch and wait, when it fails
with a 404. What they cannot see from out there is which half failed: a 404 of the dispatch
has trained nothing, after a 404 of the wait the operation has been carried out already, and
is carried out again.

Two choices of this demo. The first dispatch is made when the method is called, and the
retries in ``result()``, so that a script may submit ahead. And a ``NotFoundError`` also
counts where it is the cause of what ``result()`` raises: the SDK wraps the 404 of a poll in a
``ValueError``, and strategies that do not look inside die there like plain tinker.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    retry_if_exception_type,
    retry_if_result,
    stop_after_attempt,
    stop_after_delay,
    wait_chain,
    wait_exponential,
    wait_fixed,
)
from tinker import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

WRAPPED: Final = frozenset({"forward_backward", "optim_step", "save_state", "load_state"})

WARM_SUCCESSES: Final = 3
WARM_PAUSE: Final = 1.0
"""Seconds between two successes of the warm-up."""
WARM_LONGEST_WAIT: Final = 8.0
"""Seconds that the warm-up waits after a 404 at most."""
WARM_TIMEOUT: Final = 120.0
"""Seconds that the warm-up takes at most."""
PROBE_TIMEOUT: Final = 5.0
"""Seconds that a question to the control plane takes at most."""


def is_404(error: BaseException) -> bool:
    """Whether an error is a 404, or was caused by one."""
    return isinstance(error, NotFoundError) or isinstance(error.__cause__, NotFoundError)


class Retried:
    """An operation that has been dispatched, and is again when its result is a 404."""

    def __init__(self, dispatch: Callable[[], Any], policy: Callable[[], Retrying]) -> None:
        self._dispatch = dispatch
        self._policy = policy
        self._dispatched = [dispatch()]

    def result(self) -> Any:
        """The result, of whichever dispatch had one."""
        return self._policy()(self._attempt)

    def _attempt(self) -> Any:
        future = self._dispatched.pop() if self._dispatched else self._dispatch()
        return future.result()


class StrategyA:
    """Retry every 404: six times, for about 90 seconds."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name not in WRAPPED:
            return method
        return lambda *args, **kwargs: Retried(partial(method, *args, **kwargs), self._policy)

    def _policy(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception(is_404),
            wait=wait_exponential(multiplier=2, max=30),
            stop=stop_after_attempt(7),
            reraise=True,
        )


class StrategyB(StrategyA):
    """Warm up after connecting; retry a 404 four times, while the job is said to run."""

    def __init__(self, client: Any) -> None:
        super().__init__(client)
        self._in_a_row = 0
        self._refusals = 0
        self._warm_up()

    def _policy(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception(lambda error: is_404(error) and job_runs()),
            wait=wait_chain(*(wait_fixed(seconds) for seconds in (2, 4, 8, 15))),
            stop=stop_after_attempt(5),
            reraise=True,
        )

    def _warm_up(self) -> None:
        policy = Retrying(
            retry=retry_if_result(lambda warm: not warm) | retry_if_exception_type(NotFoundError),
            wait=self._pause,
            stop=stop_after_delay(WARM_TIMEOUT),
            retry_error_callback=_not_warm,
        )
        policy(self._probe)

    def _probe(self) -> bool:
        try:
            self._client.get_info()
        except NotFoundError:
            self._in_a_row = 0
            self._refusals += 1
            raise
        except Exception:  # noqa: BLE001 - the training will fail with it
            return True
        self._in_a_row += 1
        return self._in_a_row >= WARM_SUCCESSES

    def _pause(self, _: RetryCallState) -> float:
        if self._in_a_row:
            return WARM_PAUSE
        # An absurdly high power would be computed in full before it is cut.
        return min(2.0 ** min(self._refusals, 10), WARM_LONGEST_WAIT)


def _not_warm(_: RetryCallState) -> bool:
    raise TimeoutError(f"the route was not warm after {WARM_TIMEOUT:.0f} s")


def job_runs() -> bool:
    """Whether the control plane says that the job of TINKER_BASE_URL is running."""
    url = urlsplit(os.environ["TINKER_BASE_URL"])
    account, job = url.path.rstrip("/").split("/")[-2:]
    try:
        answer = httpx.get(
            f"{url.scheme}://{url.netloc}/v1/accounts/{account}/rlorTrainerJobs/{job}",
            headers={"Authorization": f"Bearer {os.environ['TINKER_API_KEY']}"},
            timeout=PROBE_TIMEOUT,
        )
        return bool(answer.raise_for_status().json()["state"] == "JOB_STATE_RUNNING")
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return False


STRATEGIES: Final[Mapping[str, Callable[[Any], Any]]] = {"a": StrategyA, "b": StrategyB}
