"""Golden files of the official code, and its deterministic weights and images."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "golden"


def load(name):
    """Tensors and description of a golden file."""
    return load_file(FOLDER / f"{name}.safetensors"), describe(name)


def describe(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def hashed(n, i):
    """n numbers in [-1, 1) that depend on i alone."""
    j = torch.arange(1, n + 1, dtype=torch.float64)
    value = torch.sin(12.9898 * j + 78.233 * i).abs() * 43758.5453
    return 2 * (value - value.floor()) - 1


def filled_state_dict(description):
    """The official state dict of a whole model, filled by rule instead of stored."""
    state, i = {}, 0
    for key, shape, dtype in description["state_dict"]:
        if dtype == "int64":
            state[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        i += 1
        c = hashed(math.prod(shape), i).reshape(shape)
        one_dimensional = len(shape) == 1
        if key.endswith("running_var") or (one_dimensional and key.endswith(".weight")):
            state[key] = 1 + 0.1 * c
        elif one_dimensional:
            state[key] = 0.1 * c
        elif any(word in key for word in ("step", "temp", "embedding", "token")) or key.endswith("cls_emb"):
            state[key] = c
        else:
            state[key] = c * math.sqrt(3 / (c.numel() / shape[0]))
    return state


def images():
    n = 2 * 3 * 224 * 224
    wave = torch.sin(0.013 * torch.arange(n, dtype=torch.float64))
    return (wave + hashed(n, 100)).reshape(2, 3, 224, 224)
