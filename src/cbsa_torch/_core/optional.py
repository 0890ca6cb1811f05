"""The extras: which packages each brings, and an error that says which to install."""

from __future__ import annotations

import importlib.util

EXTRAS = {
    "models": ("timm", "safetensors", "huggingface_hub"),
    "streaming": ("timm", "safetensors", "huggingface_hub", "numpy", "PIL"),
    "interpret": ("matplotlib", "jinja2", "numpy", "PIL"),
    "train": ("timm", "accelerate", "torchmetrics", "sklearn", "tensorboard", "tyro", "rich", "yaml"),
    "slides": ("h5py",),
    "export": ("timm", "onnx", "onnxscript", "onnxruntime"),
}
"""Import names of the packages that an extra of ``pyproject.toml`` brings."""


def require(extra: str) -> None:
    """Raise ``ImportError`` with the pip command unless the packages of ``extra`` are installed.

    Args:
        extra: a key of :data:`EXTRAS`.
    """
    for module in EXTRAS[extra]:
        if importlib.util.find_spec(module) is None:
            raise ImportError(
                f"this part of cbsa_torch needs {module!r}, which is not installed; "
                f"install it with: pip install 'cbsa-torch[{extra}]'"
            )
