import os

# Read when torch is imported, hence before it: tests run side by side, with one thread each, as do the processes
# that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels in Triton run in its interpreter then. Triton reads this when it is imported, hence here.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    # The longest tests are those that train: first, so that no worker is left with one at the end.
    items.sort(key=lambda item: not item.nodeid.startswith("tests/train/"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    torch.set_num_threads(1)  # a test that trained with more leaves it so


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
