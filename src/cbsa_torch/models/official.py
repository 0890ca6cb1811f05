"""What readers of official checkpoints share; errors use the names of the official code."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from cbsa_torch._core.checks import check_positive_int, some_of
from cbsa_torch.models.checkpoint import CheckpointError, floating_dtype, load_strictly

PER_HEAD = ("step_x", "step_rep", "temp")
"""Parameters ``(H,)`` of ours that the official code stores as (H, 1, 1) or (H, 1)."""


def count_layers(official: Mapping[str, Tensor], prefix: str, source: str) -> int:
    """How many layers are numbered after ``prefix``, from 0 on without a gap; at least one."""
    pattern = re.escape(prefix) + r"(\d{1,4})\."
    layers = {int(found[1]) for key in official if (found := re.match(pattern, key))}
    if not layers or max(layers) >= len(layers):
        raise CheckpointError(f"{source} is not an official checkpoint: it has layers {sorted(layers)[:8]}")
    return len(layers)


def check_shapes(official: Mapping[str, Tensor], needed: Mapping[str, str], source: str) -> None:
    """Raise unless tensors have shapes such as ``"(heads, 1, 1)"``; a word stands for any number above 0."""
    for key, axes in needed.items():
        shape = tuple(official[key].shape) if key in official else ()
        sizes = axes.strip("()").split(", ")
        pairs = zip(shape, sizes, strict=False)
        fits = all(side > 0 and (name[0].isalpha() or side == int(name)) for side, name in pairs)
        if len(shape) != len(sizes) or not fits:
            found = f"has shape {shape} instead of {axes}" if key in official else f"is missing, {axes}"
            raise CheckpointError(f"{source} is not an official checkpoint: {key} {found}")


def grid_side(cells: int, source: str) -> int:
    """The side of a square grid of position embeddings."""
    side = math.isqrt(max(cells, 0))
    if not cells or side * side != cells:
        raise CheckpointError(f"{source}: {cells} position embeddings are not a square grid")
    return side


def choose_heads(source: str, inner: int, *, told: int | None, given: int | None, usual: int | None) -> int:
    """The number of heads: what a shape tells, else what the caller gives, else the usual one.

    ``inner``: channels of the projection, all heads together.
    """
    if given is not None:
        check_positive_int("num_heads", given)
    if told is not None and given not in (None, told):
        raise CheckpointError(f"num_heads must be {told}, as {source} has them, or left out; got {given}")
    heads = told or given or usual
    if not heads:
        raise CheckpointError(f"{source}: its number of heads cannot be told from its weights; give num_heads")
    if inner % heads:
        raise CheckpointError(
            f"{source}: {inner} channels of its projections are not {heads} heads; give num_heads"
        )
    return heads


def build_and_load(
    make: Callable[[], nn.Module], official: Mapping[str, Tensor], table: Mapping[str, str], source: str
) -> nn.Module:
    r"""Build a model and load official weights; in eval mode, in the dtype of the weights.

    Args:
        make: builds the model.
        official: names and tensors of the official code.
        table: our name, a regular expression, to the official one, with the groups as ``\1``, ``\2``.
        source: of the weights, for messages.

    Raises:
        CheckpointError: sizes that no model has, or tensors that do not fit it.
    """
    try:
        model = make()
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{source} is not an official checkpoint: {error}") from error
    names = {
        ours: next(m.expand(theirs) for pattern, theirs in table.items() if (m := re.fullmatch(pattern, ours)))
        for ours in model.state_dict()
    }
    missing = [theirs for theirs in names.values() if theirs not in official]
    unexpected = sorted(official.keys() - set(names.values()))
    if missing or unexpected:
        raise CheckpointError(
            f"{source} does not fit the model: missing {some_of(missing, 8) or 'nothing'}; "
            f"unexpected {some_of(unexpected, 8) or 'nothing'}"
        )
    tensors = {
        ours: official[theirs].flatten() if theirs.endswith(PER_HEAD) else official[theirs]
        for ours, theirs in names.items()
    }
    load_strictly(model.to(floating_dtype(tensors)), tensors, source)
    return model.eval()
