"""The model card of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cbsa_torch._core.files import write_atomically
from cbsa_torch.models.card import model_card
from cbsa_torch.train.run.folder import RunFolder


def write_model_card(folder: RunFolder, info: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    """Write ``README.md`` into the run's folder, replacing it atomically.

    Args:
        folder: of the run.
        info: the description in the checkpoint that the card is about.
        history: rows of ``metrics.jsonl`` so far.
    """
    write_atomically(folder.card, model_card(info, history).encode())
