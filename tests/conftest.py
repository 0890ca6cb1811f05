import os

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels in Triton run in its interpreter then. Triton reads this when it is imported, hence here.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


def pytest_configure(config):
    # pytest-xdist runs several processes: one thread each
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
