"""What can be streamed, into what, with how much memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, cast

from torch import nn

from cbsa_torch._core.checks import check_choice
from cbsa_torch._core.linear import call_changes
from cbsa_torch.models import Segmenter, TokenSetTransformer, WhiteBoxTransformer
from cbsa_torch.models.segmentation.decoder import MaskTransformerDecoder

Result = Literal["logits", "map", "features", "labels"]
RESULTS: tuple[Result, ...] = ("logits", "map", "features", "labels")
MARGIN = 1.5
"""Of memory: what allocators and kernels take beside the numbers that are counted."""
_BASES = {"": 1000, "i": 1024}
_UNITS = {"": 1, "b": 1, **{f"{u}{i}b": b**n for n, u in enumerate("kmgt", 1) for i, b in _BASES.items()}}


def parse_bytes(text: int | str) -> int:
    """A number of bytes, from one or from a text such as ``"500MB"`` or ``"2GiB"``.

    Raises ``ValueError`` for other texts and numbers below 1.

    Examples:
        >>> from cbsa_torch.streaming import parse_bytes
        >>> parse_bytes("2GiB"), parse_bytes("500MB")
        (2147483648, 500000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = None if found is None else _UNITS.get(found[2].lower())
    size = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if size < 1 or isinstance(text, bool):
        raise ValueError(f"memory must be a number of bytes or a text such as '2GiB' or '500MB', got {text!r}")
    return size


Encoder = WhiteBoxTransformer | TokenSetTransformer


def parts_of(model: nn.Module) -> tuple[Encoder, MaskTransformerDecoder | None]:
    """Encoder and decoder; raises where a model cannot be streamed."""
    encoder = model.encoder if type(model) is Segmenter else model
    decoder = model.decoder if type(model) is Segmenter else None
    known = (WhiteBoxTransformer,) if decoder is not None else (WhiteBoxTransformer, TokenSetTransformer)
    if type(encoder) not in known or type(decoder) not in (type(None), MaskTransformerDecoder):
        raise TypeError(
            "model must be a WhiteBoxTransformer, a TokenSetTransformer, or a Segmenter of a "
            f"WhiteBoxTransformer with a MaskTransformerDecoder, got {type(model).__name__}"
            + (f" of {type(encoder).__name__}" if encoder is not model else "")
        )
    for name, part in (("model", model), ("encoder", encoder), ("decoder", decoder)):
        if part is not None and call_changes(part):
            raise ValueError(f"{name} cannot be streamed: {call_changes(part)}, which would not act; remove it")
    if any(part.training for part in model.modules()):
        raise ValueError("model must be in evaluation mode, for batch norms and dropout: call model.eval()")
    return cast(Encoder, encoder), decoder


def check_results(
    results: Sequence[str] | None, encoder: Encoder, decoder: MaskTransformerDecoder | None
) -> set[str]:
    """The names of the results, those of the default for None; raises for what the model cannot make."""
    if results is None:
        results = ("logits" if decoder is None else "labels",)
    for name in results:
        check_choice("results", name, RESULTS)
    if not results:
        raise ValueError(f"results must name at least one of {', '.join(RESULTS)}")
    if "labels" in results and (decoder is None or decoder.num_classes == 1):
        raise ValueError("results: labels need a Segmenter of at least two classes")
    if "logits" in results and decoder is not None:
        raise ValueError("results: a Segmenter has no logits of the whole image; ask for labels")
    if "logits" in results and not encoder.global_pool:
        raise ValueError("results: logits need a model with a global_pool; ask for features")
    return set(results)
