"""``python -m tests.helpers.in_turn A.yaml B.yaml``: several runs in one process, one after the other."""

import sys

from cbsa_torch.train import load_config, train
from cbsa_torch.train.engine.accelerate import leave_process_group

if __name__ == "__main__":
    for path in sys.argv[1:]:
        train(load_config(path))
    leave_process_group()
