"""The driver as operators of ``torch.library``, opaque to compilers.

First derivatives are the driver's backward pass, also an operator; further ones are those of the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbsa_torch._core.precision import no_autocast
from cbsa_torch._core.types import CellPooling, GridPooling
from cbsa_torch.ops.cbsa import driver
from cbsa_torch.ops.cbsa.driver import Gradients, Problem, Results
from cbsa_torch.ops.cbsa.inputs import CBSAInputs
from cbsa_torch.ops.cbsa.reference import cbsa_stages, project_out
from cbsa_torch.ops.token_weights import spread

_PROBLEM = (
    "Tensor representatives, Tensor keys, Tensor? values, Tensor step_representatives, Tensor step_tokens, "
    "Tensor? key_mask, Tensor? representative_mask, Tensor? out_weight, Tensor? out_bias, "
    "Tensor? token_weights, Tensor? cell_index, Tensor? cell_counts, Tensor? cell_order, "
    "str contraction, float scale, float eps, str impl, "
    "bool certified=False, int[] grid_size=[], int[] cells=[], int first=0"
)
_TENSORS = 13
"""The first fields of a problem are its tensors."""


def cbsa_linear_memory(
    inputs: CBSAInputs, impl: str, out_weight: Tensor | None = None, out_bias: Tensor | None = None
) -> Tensor:
    """CBSA with a shared broadcast by the passes of ``impl``, ``"tiled"`` or ``"triton"``.

    Returns:
        ``(B, H, N, P)``, or with ``out_weight`` ``(B, N, C)``, in the dtype of the tokens.
    """
    weights = inputs.token_weights
    pooling = weights if isinstance(weights, GridPooling) else GridPooling((), ())
    cells: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if isinstance(weights, CellPooling):
        cells, pooling = weights.cells, GridPooling((), (), weights.first)
    problem = Problem(
        inputs.representatives,
        inputs.keys,
        None if inputs.values is inputs.keys else inputs.values,
        inputs.step_representatives,
        inputs.step_tokens if inputs.fraction is None else inputs.fraction,
        inputs.key_mask,
        inputs.representative_mask,
        out_weight,
        out_bias,
        weights if isinstance(weights, Tensor) else None,
        *cells,
        inputs.contraction,
        inputs.scale,
        inputs.eps,
        impl,
        inputs.fraction is not None,
        *pooling,
    )
    output: Tensor
    output, _, _, step, _ = cbsa_op(*problem)
    if weights is None:
        return output
    with no_autocast(output):  # Pi^T K, in the place of the tokens
        n = inputs.tokens.shape[2]
        if out_weight is None:
            return output + spread(weights, step, n).to(output.dtype)
        projected = project_out(step, out_weight, None)[:, None]  # (B, 1, M, C)
        return output + spread(weights, projected, n)[:, 0].to(output.dtype)


@torch.library.custom_op(
    "cbsa_torch::cbsa", mutates_args=(), schema=f"({_PROBLEM}) -> ({', '.join(['Tensor'] * 5)})"
)
def cbsa_op(*problem: Any) -> Results:
    """:func:`cbsa_torch.ops.cbsa.driver.forward`."""
    return driver.forward(Problem(*problem))


@torch.library.custom_op(
    "cbsa_torch::cbsa_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor picked, Tensor normalizer, Tensor? d_step, Tensor longest, "
    f"{_PROBLEM}) -> ({', '.join(['Tensor'] * 7)})",
)
def cbsa_backward_op(
    gradient: Tensor, picked: Tensor, normalizer: Tensor, d_step: Tensor | None, longest: Tensor, *problem: Any
) -> Gradients:
    """:func:`cbsa_torch.ops.cbsa.driver.backward`."""
    return driver.backward(gradient, picked, normalizer, d_step, longest, Problem(*problem))


@cbsa_op.register_fake
def _(*problem: Any) -> Results:
    return driver.empty_results(Problem(*problem))


@cbsa_backward_op.register_fake
def _(
    gradient: Tensor, picked: Tensor, normalizer: Tensor, d_step: Tensor | None, longest: Tensor, *problem: Any
) -> Gradients:
    inputs = Problem(*problem)

    def like(name: str) -> Tensor:
        tensor = getattr(inputs, name)
        if tensor is None:
            return inputs.keys.new_empty(0)
        return driver.like_tokens(tensor) if name in ("keys", "values") else tensor.new_empty(tensor.shape)

    return Gradients(*map(like, Gradients._fields))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, picked, normalizer, step, longest = output
    kept = (picked, normalizer, longest)
    ctx.mark_non_differentiable(*kept, *(() if Problem(*inputs).certified else (step,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], *kept)
    ctx.options = inputs[_TENSORS:]


def _differentiate(ctx: Any, gradient: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients in the places of their inputs, None for what has none."""
    *tensors, picked, normalizer, longest = ctx.saved_tensors  # unpacked once: checkpointing allows no more
    problem = Problem(*tensors, *ctx.options)
    d_step = others[2] if problem.certified else None
    if gradient is None:
        if d_step is None:
            return (None,) * len(Problem._fields)
        gradient = torch.zeros_like(driver.empty_results(problem).output)
    if torch.is_grad_enabled():  # create_graph=True: somebody differentiates the gradients
        found = _by_reference(gradient, d_step, longest, problem, ctx.needs_input_grad)
    else:
        found = Gradients(*cbsa_backward_op(gradient, picked, normalizer, d_step, longest, *problem))._asdict()
    return tuple(None if t is None else found.get(name) for name, t in problem._asdict().items())


def _by_reference(
    gradient: Tensor, d_step: Tensor | None, longest: Tensor, problem: Problem, needed: tuple[bool, ...]
) -> dict[str, Tensor]:
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
    stages = cbsa_stages(inputs)
    output, step = stages.output, None
    if own.certified:
        length = (own.step_tokens * longest)[..., None, None]
        step = -length * stages.contracted  # K, (B, H, M, P)
        output = (own.step_representatives[:, None, None] * stages.attention).mT @ step
    output = output.to(own.keys.dtype)
    if own.out_weight is not None:
        output = project_out(output, own.out_weight, own.out_bias)
    outputs, gradients = [output], [gradient]
    if step is not None and d_step is not None:
        outputs, gradients = [output, step], [gradient, d_step]
    wanted = {name: getattr(own, name) for name, need in zip(Problem._fields, needed, strict=False) if need}
    found = torch.autograd.grad(outputs, list(wanted.values()), gradients, create_graph=True, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


cbsa_op.register_autograd(_differentiate, setup_context=_save)
