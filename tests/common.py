"""What the tests of every SDK share; imports none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinker_routefix.lab import Lab

CANARY = "tml-canary-5f2c9e7d41"
"""The key that every test uses; it must not turn up anywhere."""


def exact(lab: Lab, *, gradients: int, optim_steps: int) -> None:
    """The trainer has carried out what was asked for: once, in order, and nothing else."""
    ledger = lab.ledger
    done = (ledger.gradients, ledger.optim_steps)
    assert done == (gradients, optim_steps), ledger.summary()
    assert not ledger.duplicates(), ledger.summary()
    assert not ledger.out_of_order(), ledger.summary()
    assert not ledger.missing(), ledger.summary()
