"""``python -m tests.helpers.failing MOMENT train ...``: the command line, of which process 1 alone fails at a moment."""

import os
import sys

from cbsa_torch.cli import main
from cbsa_torch.train import losses
from cbsa_torch.train.errors import DataError
from cbsa_torch.train.tasks import classification

ERRORS = {
    "setup": DataError("only here"),
    "forward": RuntimeError("only here"),
    "backward": RuntimeError("only here"),
    "data": DataError("only here"),
    "interrupt": KeyboardInterrupt("only here"),
    "exit": SystemExit(3),
}


def fail_at(moment):
    error = ERRORS[moment]

    def fail(*args, **options):
        raise error

    if moment == "setup":
        classification.open_splits = fail
        return
    loss, count = losses.mean_loss, 0

    def failing(logits, targets, *options):
        nonlocal count
        count += 1
        if count == 3:
            if moment != "backward":
                raise error
            logits.register_hook(fail)
        return loss(logits, targets, *options)

    losses.mean_loss = failing


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        fail_at(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
