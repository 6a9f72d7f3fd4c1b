"""How long to wait between two tries: numbers, and nothing else.

A wait that ran its full length counts, and the next one is twice as long. A wait that was ended
early, because the route works again, costs nothing: some replicas may know the route while others
do not. It is only paced.
"""

from __future__ import annotations

import random
import time

PACE = (0.5, 1.0)
"""Seconds between two replays of one request that were released early, at random (jitter). In step
with the prober they could get the same two replicas for ever, where a load balancer takes turns."""

SLOWER_AFTER, SLOWER_PACE = 5, (0.8, 1.6)
"""After so many of them, less often: a route that answers probes and refuses a request may do so
for long."""

JITTER = 0.1
"""Waits are shortened by up to this share, so that clients that were refused together do
not come back together."""

LARGEST_DOUBLING = 30
"""Doublings of a delay after which it is surely the longest; a float ends at 1,024."""


class Backoff:
    """The waits of one request, or of one warm-up."""

    def __init__(self, base_delay: float, max_delay: float) -> None:
        self.counted_waits = 0
        """Those that ran their full length."""
        self.early_in_a_row = 0
        """How many waits in a row were ended early."""
        self.not_before = float("-inf")
        """No wait ends before this moment: the pace of those that were ended early."""
        self._base_delay = base_delay
        self._max_delay = max_delay

    def next_delay(self) -> float:
        """Seconds of the next wait."""
        doubled = self._base_delay * 2 ** min(self.counted_waits, LARGEST_DOUBLING)
        delay: float = min(doubled, self._max_delay) * random.uniform(1 - JITTER, 1)  # noqa: S311
        return delay

    def ended_early(self) -> None:
        """Note a wait that the route has ended."""
        self.early_in_a_row += 1
        pace = PACE if self.early_in_a_row < SLOWER_AFTER else SLOWER_PACE
        self.not_before = time.monotonic() + random.uniform(*pace)  # noqa: S311

    def ran_out(self, *, counts: bool) -> None:
        """Note a wait that has run its length; one for a confirmation does not count."""
        self.early_in_a_row = 0
        self.counted_waits += counts
