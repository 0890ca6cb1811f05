"""What ``torch.utils.flop_counter`` sees of the custom operators: the products of the equations.

What is computed twice to save memory, or projected before it is broadcast, is counted as if it were not.
Importing this module registers the formulas (``cbsa_torch.models`` does); it is not imported with the package,
for torch's counter imports triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from cbsa_torch.ops import counting
from cbsa_torch.ops.cbsa.fused import fused, fused_backward
from cbsa_torch.ops.cbsa.tiled import tiled, tiled_backward

Shape = torch.Size


def _register(op: Any, backward: Any) -> None:
    """Let counters see ``op``, and ``backward`` as twice of it."""

    def forward_flops(
        representatives: Shape,
        keys: Shape,
        values: Shape | None,
        eta: Shape,
        kappa: Shape,
        key_mask: Shape | None,
        representative_mask: Shape | None,
        *others: Any,
        out_shape: Any = None,
    ) -> int:
        *projection, contraction, _, _ = others
        b, h, n, p = keys
        heads = counting.cbsa(n, representatives[2], num_heads=h, head_dim=p, contraction=contraction)
        projected = 2 * n * h * p * projection[0][0] if projection and projection[0] is not None else 0
        return b * (heads.products + projected)

    def backward_flops(gradient: Shape, *inputs: Any, out_shape: Any = None) -> int:
        *tensors, _, _, contraction, scale, eps = inputs  # without what the forward pass kept
        return 2 * forward_flops(*tensors, contraction, scale, eps)

    register_flop_formula(op._opoverload.overloadpacket)(forward_flops)
    register_flop_formula(backward._opoverload.overloadpacket)(backward_flops)


_register(tiled, tiled_backward)
_register(fused, fused_backward)
