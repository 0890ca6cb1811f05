"""The driver as operators of ``torch.library``: opaque to compilers, differentiable twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbsa_torch._core.precision import compute_dtype
from cbsa_torch.ops.cbsa import driver
from cbsa_torch.ops.cbsa.driver import Gradients, Problem, Results
from cbsa_torch.ops.cbsa.inputs import CBSAInputs
from cbsa_torch.ops.cbsa.reference import cbsa_stages, project_out

_PROBLEM = (
    "Tensor representatives, Tensor keys, Tensor? values, Tensor step_representatives, Tensor step_tokens, "
    "Tensor? key_mask, Tensor? representative_mask, Tensor? out_weight, Tensor? out_bias, "
    "str contraction, float scale, float eps, str impl"
)
_TENSORS = 9
"""The first fields of a problem are its tensors."""


def cbsa_linear_memory(
    inputs: CBSAInputs, impl: str, out_weight: Tensor | None = None, out_bias: Tensor | None = None
) -> Tensor:
    """CBSA with a shared broadcast by the passes of ``impl``, ``"tiled"`` or ``"triton"``.

    Returns:
        ``(B, H, N, P)``, or with ``out_weight`` ``(B, N, C)``, in the dtype of the tokens.
    """
    problem = Problem(
        inputs.representatives,
        inputs.keys,
        None if inputs.values is inputs.keys else inputs.values,
        _per_head(inputs.step_representatives, inputs),
        _per_head(inputs.step_tokens, inputs),
        inputs.key_mask,
        inputs.representative_mask,
        out_weight,
        out_bias,
        inputs.contraction,
        inputs.scale,
        inputs.eps,
        impl,
    )
    output: Tensor = cbsa_op(*problem)[0]
    return output


def _per_head(step: Tensor | float, inputs: CBSAInputs) -> Tensor:
    """A step size as ``(H,)``."""
    if isinstance(step, Tensor):
        return step
    dtype = compute_dtype(inputs.tokens.dtype)
    return torch.full((inputs.tokens.shape[1],), float(step), dtype=dtype, device=inputs.tokens.device)


@torch.library.custom_op(
    "cbsa_torch::cbsa", mutates_args=(), schema=f"({_PROBLEM}) -> (Tensor, Tensor, Tensor)"
)
def cbsa_op(*problem: Any) -> Results:
    """:func:`cbsa_torch.ops.cbsa.driver.forward`."""
    return driver.forward(Problem(*problem))


@torch.library.custom_op(
    "cbsa_torch::cbsa_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor picked, Tensor normalizer, {_PROBLEM}) -> ({', '.join(['Tensor'] * 7)})",
)
def cbsa_backward_op(gradient: Tensor, picked: Tensor, normalizer: Tensor, *problem: Any) -> Gradients:
    """:func:`cbsa_torch.ops.cbsa.driver.backward`."""
    return driver.backward(gradient, picked, normalizer, Problem(*problem))


@cbsa_op.register_fake
def _(*problem: Any) -> Results:
    return driver.empty_results(Problem(*problem))


@cbsa_backward_op.register_fake
def _(gradient: Tensor, picked: Tensor, normalizer: Tensor, *problem: Any) -> Gradients:
    o = Problem(*problem)

    def like(tensor: Tensor | None) -> Tensor:
        return o.keys.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return Gradients(
        like(o.representatives),
        driver.like_tokens(o.keys),
        like(None) if o.values is None else driver.like_tokens(o.keys),
        like(o.step_representatives),
        like(o.step_tokens),
        like(o.out_weight),
        like(o.out_bias),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    kept = output[1:]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], *kept)
    ctx.options = inputs[_TENSORS:]


def _differentiate(ctx: Any, gradient: Tensor | None, *_: Any) -> Problem:
    """The gradients in the places of their inputs; those of inputs that are None are discarded."""
    nothing = Problem(*[None] * len(Problem._fields))  # type: ignore[arg-type]
    if gradient is None:
        return nothing
    *tensors, picked, normalizer = ctx.saved_tensors  # unpacked once: checkpointing allows no more
    problem = Problem(*tensors, *ctx.options)
    if torch.is_grad_enabled():  # create_graph=True: somebody differentiates the gradients
        return nothing._replace(**_by_reference(gradient, problem, ctx.needs_input_grad))
    found = Gradients(*cbsa_backward_op(gradient, picked, normalizer, *problem))
    return nothing._replace(**{k: g for k, g in found._asdict().items() if getattr(problem, k) is not None})


def _by_reference(gradient: Tensor, problem: Problem, needed: tuple[bool, ...]) -> dict[str, Tensor]:
    """The gradients by name, as functions of inputs and gradient, which can be differentiated again."""
    # Each a node of its own: representatives may be made from the keys, and what reaches the keys through them
    # is not this operator's to add.
    o = Problem(*(t.view_as(t) if isinstance(t, Tensor) else t for t in problem))
    inputs = CBSAInputs(
        o.keys,
        o.representatives,
        o.keys,
        o.keys if o.values is None else o.values,
        attention=None,
        step_representatives=o.step_representatives,
        step_tokens=o.step_tokens,
        scale=o.scale,
        contraction=o.contraction,  # type: ignore[arg-type]
        broadcast="shared",
        eps=o.eps,
        token_mask=o.key_mask,
        key_mask=o.key_mask,
        representative_mask=o.representative_mask,
    )
    output = cbsa_stages(inputs).output.to(o.keys.dtype)
    if o.out_weight is not None:
        output = project_out(output, o.out_weight, o.out_bias)
    wanted = {name: t for (name, t), need in zip(o._asdict().items(), needed, strict=True) if need}
    found = torch.autograd.grad(output, list(wanted.values()), gradient, create_graph=True, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


cbsa_op.register_autograd(_differentiate, setup_context=_save)
