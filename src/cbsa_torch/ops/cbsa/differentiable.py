"""How the custom operators are differentiated: once by their own backward, further by the reference.

Both take ``(representatives, keys, values or None, step_representatives, step_tokens, key_mask or None,
representative_mask or None, ..., contraction, scale, eps)`` and return the output and what their backward
needs beside the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cbsa_torch.ops.cbsa.reference import cbsa_reference, project_out

Gradients = tuple["Tensor | None", ...]


def like_tokens(tokens: Tensor) -> Tensor:
    """Empty ``(B, H, N, P)``, laid out so that joining the heads is no copy."""
    b, h, n, p = tokens.shape
    return tokens.new_empty(b, n, h, p).transpose(1, 2)


def register(op: Any, backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Let ``op`` be differentiated by ``backward``.

    ``backward(gradient, *inputs, *kept, contraction, scale, eps)`` returns gradients of the first five tensors
    and of those after the masks; one that was None may get anything.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, contraction, scale, eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.inputs = len(tensors)
        ctx.options = contraction, scale, eps

    def differentiate(ctx: Any, gradient: Tensor | None, *_: Any) -> Gradients:
        if gradient is None:
            return (None,) * (ctx.inputs + 3)
        saved = ctx.saved_tensors  # unpacked once: checkpointing allows no more
        inputs, kept = saved[: ctx.inputs], saved[ctx.inputs :]
        if torch.is_grad_enabled():  # create_graph=True: somebody differentiates the gradients
            return _by_reference(gradient, inputs, ctx.options, ctx.needs_input_grad)
        found = backward(gradient, *inputs, *kept, *ctx.options)
        grads = (*found[:5], None, None, *found[5:])
        present = (None if tensor is None else grad for tensor, grad in zip(inputs, grads, strict=True))
        return (*present, None, None, None)

    op.register_autograd(differentiate, setup_context=save)


def _by_reference(
    gradient: Tensor,
    inputs: tuple[Tensor | None, ...],
    options: tuple[str, float, float],
    needed: tuple[bool, ...],
) -> Gradients:
    """The gradients as functions of inputs and gradient, which can be differentiated again."""
    # Each a node of its own: representatives may be made from the keys, and what reaches the keys through them
    # is not this operator's to add.
    inputs = tuple(None if t is None else t.view_as(t) for t in inputs)
    rep, keys, values, eta, kappa, key_mask, rep_mask, *projection = inputs
    contraction, scale, eps = options
    assert rep is not None
    assert keys is not None
    assert eta is not None
    assert kappa is not None
    stages = cbsa_reference(
        keys, rep, keys, keys if values is None else values,
        attention=None, step_representatives=eta, step_tokens=kappa, scale=scale, contraction=contraction,
        fresh_broadcast=False, eps=eps, token_mask=key_mask, key_mask=key_mask, representative_mask=rep_mask,
    )  # fmt: skip
    output = stages.output.to(keys.dtype)
    if projection and projection[0] is not None:
        output = project_out(output, projection[0], projection[1])
    wanted = [t for t, need in zip(inputs, needed, strict=False) if t is not None and need]
    found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=True, allow_unused=True))
    return (*(next(found) if need else None for need in needed[: len(inputs)]), None, None, None)
