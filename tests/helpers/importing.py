"""``python -m tests.helpers.importing OTHERS OURS``: what importing OURS changes after OTHERS are there.

Both are lists of modules in JSON; prints what is different as JSON, by name: [before, after].
"""

import atexit
import importlib
import json
import locale
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from types import FunctionType

import numpy as np
import torch
from matplotlib import rcParams
from PIL import Image, ImageFile


def state():
    """What a process has one of, and what an import could change."""
    found = {
        "atexit": atexit._ncallbacks(),
        "warnings": warnings.filters,
        "hooks of sys": (sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook),
        "import paths": (sys.path, sys.meta_path, sys.path_hooks),
        "threads": (threading.active_count(), torch.get_num_threads(), torch.get_num_interop_threads()),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "dtype and device": (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        "precision": (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "random numbers": (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        ),
        "environment": sorted(os.environ.items()),
        "folder and locale": (os.getcwd(), locale.setlocale(locale.LC_ALL)),  # noqa: PTH109
        "Pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "matplotlib": dict(rcParams),
    }
    for number in signal.valid_signals():
        found[f"signal {number}"] = signal.getsignal(number)
    for name, logger in [("root", logging.root), *logging.root.manager.loggerDict.items()]:
        if isinstance(logger, logging.Logger):
            found[f"logger {name}"] = (logger.handlers, logger.filters, logger.level, logger.propagate)
    for name, hooks in vars(torch.nn.modules.module).items():
        if name.startswith("_global_"):
            found[f"torch's {name}"] = hooks
    return {name: repr(value) for name, value in found.items()} | functions()


def functions():
    """Functions and classes of other packages: none is to be replaced."""
    return {
        f"{module_name}.{name}": str(id(value))
        for module_name, module in list(sys.modules.items())
        if not module_name.startswith("cbsa_torch")
        for name, value in list(vars(module).items() if hasattr(module, "__dict__") else ())
        if isinstance(value, (FunctionType, type))
    }


def main(others, ours):
    for name in others:
        importlib.import_module(name)
    before = state()
    for name in ours:
        importlib.import_module(name)
    after = state()
    changed = {name: [value, after.get(name)] for name, value in before.items() if after.get(name) != value}
    # A logger of ours may be new, its handlers may not.
    new = {
        n: [None, value] for n, value in after.items() if n.startswith("logger cbsa_torch") and "[<" in value
    }
    print(json.dumps(changed | new))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
