"""The training script of the demo: the same file for every contender.

It says what happens to it in JSON, one line per event, for the race to read. It runs on
every tinker from 0.15.0 on.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import sys
from typing import Any

LAST_SECONDS = 150.0
"""Seconds after which it ends by itself: should the race die, nothing is left behind."""

TOKENS = 8


def say(event: str, **about: Any) -> None:
    """Print an event."""
    sys.stdout.write(json.dumps({"event": event, **about}) + "\n")
    sys.stdout.flush()


def train(options: argparse.Namespace) -> None:
    """Connect, train, save."""
    if options.shim:
        import tinker_routefix  # noqa: F401 - the one line
    import tinker
    from tinker import types

    say("started")
    service = tinker.ServiceClient()
    created: Any = service.create_lora_training_client(base_model="lab/base", rank=8)
    # Newer releases return a future of the client.
    client = created.result() if hasattr(created, "result") else created
    if options.strategy:
        from tinker_routefix.demo import earlier

        client = earlier.STRATEGIES[options.strategy](client)
    say("connected")

    numbers = random.Random(options.seed)  # noqa: S311

    def datum() -> types.Datum:
        tokens = [numbers.randrange(1000) for _ in range(TOKENS + 1)]
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[TOKENS]),
                "weights": types.TensorData(data=[1.0] * TOKENS, dtype="float32", shape=[TOKENS]),
            },
        )

    for step in range(1, options.steps + 1):
        # As many datums as the step's number: the ledger can tell whose gradient it has.
        gradient = client.forward_backward([datum() for _ in range(step)], "cross_entropy")
        update = client.optim_step(types.AdamParams(learning_rate=1e-4))
        say("submitted", step=step)
        gradient.result()
        update.result()
        say("step", step=step)
    client.save_state("demo").result()
    say("saved")


def main() -> int:
    """Run the script; 1 if it died."""
    parser = argparse.ArgumentParser(description="Train against TINKER_BASE_URL.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--shim", action="store_true", help="import tinker_routefix")
    how.add_argument("--strategy", choices=["a", "b"], help="wrap the client in an earlier one")
    faulthandler.dump_traceback_later(LAST_SECONDS, exit=True)
    try:
        train(parser.parse_args())
    except Exception as error:  # noqa: BLE001 - the race wants to know, whatever it is
        say("error", type=type(error).__name__, message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
