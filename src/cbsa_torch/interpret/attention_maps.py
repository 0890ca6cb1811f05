"""Attention maps (the paper's Fig. 7): a row of A A^T, without forming that N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch.interpret.capture import LayerRecord


def cls_attention_maps(record: LayerRecord, token: int = 0) -> Tensor:
    """How much a token attends to every grid token, through the representatives.

    CBSA never forms the token-to-token matrix; its counterpart is A A^T (paper, section 4.1), of which
    this is the row of ``token``: sum over representatives i of A[token, i] A[n, i].

    Args:
        record: a captured layer.
        token: index among all N tokens, prefix tokens first: 0 is the class token of a model that has one,
            else the first grid token.

    Returns:
        ``(B, H, *grid_size)``, prefix tokens left out.

    Raises:
        ValueError: the record has no grid. IndexError: no such token.
    """
    if record.grid_size is None:
        raise ValueError(f"{record.name} has no grid to lay a map out on; pass grid_size to the layer")
    attention = record.stages.attention  # (B, H, M, N)
    row = torch.einsum("bhm,bhmn->bhn", attention[..., token], attention)
    return row[..., record.num_prefix_tokens :].unflatten(-1, record.grid_size)
