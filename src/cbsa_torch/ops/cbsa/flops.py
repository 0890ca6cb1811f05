"""What ``torch.utils.flop_counter`` sees of our operators: the products of the equations.

What is computed twice to save memory, or projected before it is broadcast, is counted as if it were not.
Importing this module registers the formulas (``cbsa_torch.models`` does); it is not imported with the package,
for torch's counter imports triton.
"""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import register_flop_formula

from cbsa_torch.ops import counting
from cbsa_torch.ops.cbsa.driver import Problem
from cbsa_torch.ops.cbsa.library import cbsa_backward_op, cbsa_op


def _forward_flops(*problem: Any, out_shape: Any = None) -> int:
    shapes: Any = Problem(*problem)  # of its tensors
    b, h, n, p = shapes.keys
    m = shapes.representatives[2]
    grams = 0 if not shapes.certified else 1 if shapes.token_weights is None and not shapes.cells else 2
    heads = counting.cbsa(n, m, num_heads=h, head_dim=p, contraction=shapes.contraction, grams=grams)
    projection = 0 if shapes.out_weight is None else 2 * n * h * p * shapes.out_weight[0]
    products: int = b * (heads.products + projection)
    return products


def _backward_flops(
    gradient: Any, picked: Any, normalizer: Any, d_step: Any, longest: Any, *problem: Any, out_shape: Any = None
) -> int:
    return 2 * _forward_flops(*Problem(*problem)._replace(certified=False))  # no gradient goes through a limit


register_flop_formula(cbsa_op._opoverload.overloadpacket)(_forward_flops)
register_flop_formula(cbsa_backward_op._opoverload.overloadpacket)(_backward_flops)
