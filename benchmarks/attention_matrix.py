"""The table of docs/choose/index.md: every attention by cost, memory, abilities and measured accuracy.

    python -m benchmarks.attention_matrix

Costs are counted, memory is what autograd keeps, abilities are tried out on the layers, exports included; times
and accuracies are read from the records in ``benchmarks/results``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.estimates import markdown, mean_of
from cbsa_torch._core.files import write_atomically
from cbsa_torch.models import export_model
from cbsa_torch.models.export import ExportError
from cbsa_torch.nn import CBSA, MHSA, MSSA, TSSA, AgentAttention, LinearCBSA, TokenMixer
from cbsa_torch.ops import counting

RESULTS = Path("benchmarks/results")
DOCS = Path("docs/choose/index.md")
MARKERS = ("<!-- matrix: begin -->", "<!-- matrix: end -->")
DIM, HEADS = 384, 6
SHORT, LONG = 1_024, 16_384
"""Tokens that operations are counted for."""
SIDE = 64
"""Of the feature map for which memory is counted: 4,096 tokens."""


class Form(NamedTuple):
    """A row."""

    make: Callable[..., TokenMixer]
    options: Mapping[str, Any]
    timed: str = ""
    """Its name in ``layers_short.json``."""
    digits: str = ""
    """The prefix of its records of digits in ``certified``, or its member of ``digits_family.json``."""
    cifar: str = ""
    """Its name among the runs of the claims."""


FORMS = {
    "`CBSA()`": Form(CBSA, {}, "cbsa auto", "digits_default", "cbt"),
    '`CBSA(contraction="exact")`': Form(CBSA, {"contraction": "exact"}, "", "cbt_exact"),
    '`CBSA(step="certified")`': Form(
        CBSA,
        {"step": "certified"},
        "cbsa certified",
        "digits_certified_norm_gram",
        "certified",
    ),
    '`CBSA(representatives="learned")`': Form(
        CBSA, {"representatives": "learned"}, "", "cbt_learned", "learned"
    ),
    "`LinearCBSA()`": Form(LinearCBSA, {}, "", "linear_cbt"),
    "`TSSA()`": Form(TSSA, {}, "tssa", "digits_tost", "tost"),
    '`TSSA(form="channel")`': Form(TSSA, {"form": "channel"}),
    "`AgentAttention()`": Form(AgentAttention, {}, "agent", "agent", "agent"),
    "`MSSA()`": Form(MSSA, {}, "mssa", "digits_crate", "crate"),
    "`MHSA()`": Form(MHSA, {}, "mhsa", "stem_vit", "vit"),
}


def build(form: Form, dim: int = DIM, heads: int = HEADS, **options: Any) -> TokenMixer:
    """A layer of that form."""
    torch.manual_seed(0)
    return form.make(dim, heads, **{**form.options, **options}).eval()


def operations(form: Form, tokens: int) -> int:
    """FLOPs of a layer with its projections, for a square map of so many tokens."""
    layer, side = build(form), round(tokens**0.5)
    inner = layer.num_heads * layer.head_dim
    into = counting.linear(tokens, DIM, inner * (1 if layer.shared_qkv else 3))
    out = counting.Counts() if layer.proj is None else counting.linear(tokens, inner, DIM)
    counted = into + out + layer.counts(torch.empty(1, DIM, side, side))
    return counted.flops


def kept(form: Form) -> float:
    """Numbers that a layer keeps for its backward pass, in parts of its input."""
    tiled: dict[str, Any] = {"impl": "tiled"} if form.make is CBSA else {}
    layer = build(form, **tiled)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, SIDE * SIDE, DIM)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        out = layer(x)
    del out
    return sum(found.values()) / x.untyped_storage().nbytes()


def takes(form: Form, **masks: Any) -> bool:
    """Whether a layer takes these masks."""
    try:
        build(form, 32, 2)(torch.zeros(1, 16, 32), **masks)
    except ValueError:
        return False
    return True


def exports(form: Form) -> bool:
    """Whether a layer becomes an ONNX graph for maps of any size."""
    options = {"num_representatives": (2, 2)} if build(form).needs_grid else {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_model(
                build(form, 32, 2, **options), f"{folder}/layer.onnx", in_chans=32, image_size=8, any_size=True
            )
        except ExportError:
            return False
    return True


def accuracies(pattern: str) -> list[float]:
    """Test accuracies of the records of one form, in per cent."""
    return [100 * json.loads(path.read_text())["test_top1"] for path in sorted(RESULTS.glob(pattern))]


def on_digits(form: Form) -> list[float]:
    """Test accuracies on digits, of all seeds there are."""
    if not form.digits:
        return []
    family = json.loads((RESULTS / "digits_family.json").read_text())["rows"]
    found = [[100 * value for value in row["test_top1"]] for row in family if row["member"] == form.digits]
    return found[0] if found else accuracies(f"certified/{form.digits}_seed?.json")


def estimate(values: list[float]) -> str:
    """A mean with its interval, and how many seeds it is of."""
    return f"{mean_of(values).text()} ({len(values)})" if values else ""


def costs() -> str:
    """What every form costs and reaches, as a table."""
    times = {
        row["name"]: row["milliseconds"]
        for row in json.loads((RESULTS / "layers_short.json").read_text())["rows"]
        if row["training"] and row["tokens"] == SIDE * SIDE + 1
    }
    header = [
        "layer",
        *(f"GFLOPs, {tokens:,} tokens" for tokens in (SHORT, LONG)),
        "kept for training, of the input",
        "training step, CBSA = 1",
        "digits, % (seeds)",
        "CIFAR-10, % (seeds)",
    ]
    rows = [
        [
            name,
            *(f"{operations(form, tokens) / 1e9:.2f}" for tokens in (SHORT, LONG)),
            f"{kept(form):.1f}",
            f"{times[form.timed] / times['cbsa auto']:.1f}" if form.timed else "",
            estimate(on_digits(form)),
            estimate(accuracies(f"claims/scratch_{form.cifar}_seed?.json") if form.cifar else []),
        ]
        for name, form in FORMS.items()
    ]
    filled = [i for i in range(len(header)) if any(row[i] for row in rows)]  # no column of what was not run
    return markdown([header[i] for i in filled], [[row[i] for i in filled] for row in rows])


def abilities() -> str:
    """What every form can do, as a table."""
    header = ["layer", "pools, so needs a grid or coordinates", "padding masks", "causal, masks per query"]
    header += ["ONNX, any size", "certificate"]
    padding, causal = torch.ones(1, 16, dtype=torch.bool), torch.ones(16, 16, dtype=torch.bool).tril()
    rows = []
    for name, form in FORMS.items():
        layer = build(form)
        able = [
            layer.needs_grid,
            takes(form, token_mask=padding),
            takes(form, is_causal=True) and takes(form, attn_mask=causal),
            exports(form),
            getattr(layer, "step", "free") == "certified",
        ]
        rows.append([name, *("yes" if each else "no" for each in able)])
    return markdown(header, rows)


def main() -> None:
    """Write the table into its page."""
    before, rest = DOCS.read_text(encoding="utf-8").split(MARKERS[0])
    text = f"{before}{MARKERS[0]}\n\n{costs()}\n\n{abilities()}\n\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}"
    write_atomically(DOCS, text.encode())


if __name__ == "__main__":
    main()
