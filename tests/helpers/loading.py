"""``python -m tests.helpers.loading START_METHOD STUCK ENDING``: a program that reads by workers, and ends somehow.

It prints the process numbers of its workers when they have read something.
"""

import multiprocessing
import sys
import time

from PIL import Image
from torch.utils.data import Dataset

from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.data.loader import InputSpec, make_loader

SPEC = InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)


class Images(Dataset):
    """The first four can be read; on all others a worker gets stuck, in C, if asked to."""

    def __init__(self, stuck):
        self.stuck, self.transform = stuck, None

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        if index >= 4 and self.stuck:
            time.sleep(1)  # lets the worker send what it has read
            sum(range(10**12))
        return self.transform(Image.new("RGB", (8, 8))), 0


def run(start_method, stuck, ending):
    multiprocessing.set_start_method(start_method)
    config = DataConfig(workers=2)
    loader = make_loader(Images(stuck == "stuck"), SPEC, config, 2, train=False)
    batches = iter(loader)
    next(batches)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(2 if stuck == "stuck" else 0)
    if ending == "error":
        raise RuntimeError("as told")
    if ending == "exit":
        sys.exit(3)
    if ending == "collect":
        del batches
        return
    time.sleep(60)


if __name__ == "__main__":
    run(*sys.argv[1:])
