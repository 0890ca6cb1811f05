"""Small models and what is read from pages about them."""

import json
import re

import pytest
import timm

import cbsa_torch.models  # noqa: F401
from cbsa_torch import interpret

CBSA_ONLY = {"Reduced rates", "Rank of the extraction attention"}
NOT_OF_A_VIT = {*CBSA_ONLY, "Step sizes", "Coherence of the subspaces", "Sparsity"}
"""Sections that a page leaves out."""

ODD_NAMES = ["$x_{", "</script><b>", "\u732b \U0001f408", '"quoted" & \\']
"""Names with a formula, markup, letters that the font of figures lacks."""

HISTORY = [{"epoch": e, "train_loss": 1 / e, "val_loss": 1 / e, "val_top1": 1 - 0.5 / e} for e in (1, 2, 3)]

LONG_NAME = f"a_hybrid_with_a_name_too_long_for_a_phone_{'x' * 40}"

EVALUATION = {"score": 0.9, "loss": 0.3, "images": 10, "split": "test"}


def build(family="cbt", **options):
    options = {"embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3, **options}
    return timm.create_model(f"{family}_pico_patch1_8", **options).eval()


def vit(**options):
    options |= {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **options).eval()


def headings(page):
    return re.findall(r"<h2>(?:<span[^>]*></span>)?(.*?)</h2>", page)


def maps_of(page):
    """The data of a page's attention maps, one dictionary for each panel."""
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', page.read_text())
    return [json.loads(block) for block in blocks]


def strict(path):
    """JSON as it is defined: without NaN."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


def compared(name, model, images, **changes):
    run = interpret.ComparedRun(name, model, images, [0, 1, 2, 0], None, name, 10**9, 0.5)
    return run._replace(**changes)
