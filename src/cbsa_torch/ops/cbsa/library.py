"""The driver as operators of ``torch.library``, opaque to compilers.

First derivatives are the driver's backward pass, also an operator; further ones are those of the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
        inputs.step_representatives,
        inputs.step_tokens,
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
    inputs = Problem(*problem)

    def like(name: str) -> Tensor:
        tensor = getattr(inputs, name)
        if tensor is None:
            return inputs.keys.new_empty(0)
        return driver.like_tokens(tensor) if name in ("keys", "values") else tensor.new_empty(tensor.shape)

    return Gradients(*map(like, Gradients._fields))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    kept = output[1:]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], *kept)
    ctx.options = inputs[_TENSORS:]


def _differentiate(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients in the places of their inputs, None for what has none."""
    if gradient is None:
        return (None,) * len(Problem._fields)
    *tensors, picked, normalizer = ctx.saved_tensors  # unpacked once: checkpointing allows no more
    problem = Problem(*tensors, *ctx.options)
    if torch.is_grad_enabled():  # create_graph=True: somebody differentiates the gradients
        found = _by_reference(gradient, problem, ctx.needs_input_grad)
    else:
        found = Gradients(*cbsa_backward_op(gradient, picked, normalizer, *problem))._asdict()
    return tuple(None if t is None else found.get(name) for name, t in problem._asdict().items())


def _by_reference(gradient: Tensor, problem: Problem, needed: tuple[bool, ...]) -> dict[str, Tensor]:
    """The gradients by name, as functions of inputs and gradient, which can be differentiated again."""
    # Views, so that autograd.grad stops here and does not follow representatives back to the keys.
    own: Any = Problem(*(t.view_as(t) if isinstance(t, Tensor) else t for t in problem))  # type: ignore[arg-type]
    inputs = CBSAInputs(
        own.keys,
        own.representatives,
        own.keys,
        own.keys if own.values is None else own.values,
        attention=None,
        step_representatives=own.step_representatives,
        step_tokens=own.step_tokens,
        scale=own.scale,
        contraction=own.contraction,
        broadcast="shared",
        eps=own.eps,
        token_mask=own.key_mask,
        key_mask=own.key_mask,
        representative_mask=own.representative_mask,
    )
    output = cbsa_stages(inputs).output.to(own.keys.dtype)
    if own.out_weight is not None:
        output = project_out(output, own.out_weight, own.out_bias)
    wanted = {name: t for (name, t), need in zip(own._asdict().items(), needed, strict=True) if need}
    found = torch.autograd.grad(output, list(wanted.values()), gradient, create_graph=True, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


cbsa_op.register_autograd(_differentiate, setup_context=_save)
