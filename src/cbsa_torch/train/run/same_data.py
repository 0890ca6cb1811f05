"""Whether a run that goes on still has the data it began with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cbsa_torch.models.checkpoint import CheckpointError

SHOWN = 5
"""Classes that a message names."""


def data_facts(class_names: Sequence[str], training: Any, validation: Any) -> dict[str, Any]:
    """What a state remembers of the data sets: the classes in the order of the outputs, and how many images."""
    return {"class_names": list(class_names), "training": len(training), "validation": len(validation)}


def compare_data(before: dict[str, Any] | None, now: dict[str, Any], batch: int, source: str) -> list[str]:
    """What changed in the data since a state was saved, in words.

    Args:
        before: :func:`data_facts` of the state; None in one of an older version, which is taken as it is.
        now: those of the data as they are.
        batch: batches done of the epoch under way.
        source: the state's file, for errors.

    Raises:
        CheckpointError: the classes are others, or in another order: outputs would mean something else.
    """
    if before is None:
        return []
    old, new = before["class_names"], now["class_names"]
    if old != new:
        added, gone = [name for name in new if name not in old], [name for name in old if name not in new]
        parts = [
            f"{what} {_some(names)}" for what, names in (("new:", added), ("missing:", gone)) if names
        ] or ["the same in another order"]
        raise CheckpointError(
            f"{source} was trained on {len(old)} classes, the data has {len(new)}; {', '.join(parts)}. Put the "
            "data back, or start a new run from these weights with --model.init-from and another --output"
        )
    remarks = [
        f"the data has {now[part]:,} {part} images, {before[part]:,} when the state was saved"
        for part in ("training", "validation")
        if now[part] != before[part]
    ]
    if now["training"] != before["training"] and batch:
        remarks.append(
            "the epoch under way is not what it would have been: some images come twice or not at all"
        )
    return remarks


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
