"""Whether every step of a trained model lowered the coding rate of the representatives, as a theorem says.

The theorem, its proof and its limits are in :func:`cbsa_torch.ops.certified_cbsa` and in
docs/reference/certificate.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch._core.checks import check_positive_int
from cbsa_torch._core.precision import compute_dtype, no_autocast, solve_dtype
from cbsa_torch._core.types import RESIDUALS, CBSAStages, Residual
from cbsa_torch.interpret.capture import LayerRecord, capture, check_batches, named_modules
from cbsa_torch.interpret.certificate import Certificate, LayerCertificate
from cbsa_torch.interpret.structure import basis_of
from cbsa_torch.nn import CBSA, ResidualBlock
from cbsa_torch.nn.tokens import Heads, as_tokens
from cbsa_torch.ops.cbsa.inputs import certified_inputs
from cbsa_torch.ops.cbsa.reference import cbsa_stages, contract_exact
from cbsa_torch.ops.masking import zero_rows

ROUNDING = 8
"""c of the rounding that is allowed to a case: c min(M, P) u sqrt(cond)."""

MISMATCH = 16
"""c of the rounding by which an output may differ from the step computed again, see :func:`_mismatch`."""


def certificate(model: nn.Module, images: Tensor | Iterable[Tensor], *, batch_size: int = 64) -> Certificate:
    """Measure whether every CBSA layer lowers coding rates as a certified step guarantees.

    The output is that which the layer puts out, by whatever implementation, autocast and hooks included; the
    representatives, their weights B and the step size are computed again eagerly, and the rates in float64 on
    the CPU. Of layers with a free step the rates are measured and nothing is guaranteed.

    Args:
        model: a model with CBSA layers; it is run as it is (call ``.eval()`` first). A layer that is called
            more than once counts all its calls. Other layers are left out.
        images: ``(B, ...)`` inputs of the model, or batches of them. Only numbers per image and head are kept.
        batch_size: images per forward pass, of a tensor.

    Raises:
        ValueError: a model without a CBSA layer that has one basis for queries, keys and values; no image.
        TypeError: a batch is not a tensor.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import certificate
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1, step="certified").eval()
        >>> found = certificate(model, torch.randn(2, 1, 8, 8))
        >>> found.cases, found.holding
        (8, 8)
    """
    check_positive_int("batch_size", batch_size)
    batches = images.split(batch_size) if isinstance(images, Tensor) else images
    modules = dict(named_modules(model))
    found = {name: module for name, module in modules.items() if isinstance(module, CBSA)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no CBSA layer, whose steps a certificate is of")
    left_out = {name: reason for name, layer in found.items() if (reason := _no_basis(layer))}
    measured = {name: _Measured(name, layer) for name, layer in found.items() if name not in left_out}
    if not measured:
        raise ValueError(
            f"{type(model).__name__} has no CBSA layer to measure: {next(iter(left_out.values()))}"
        )
    count = 0
    with torch.no_grad(), capture(model, list(measured)) as records, ExitStack() as hooks:
        for name, layer in measured.items():
            block = modules.get(name.rpartition(".")[0])
            if block is not None and (residual := _residual(block)):
                before = functools.partial(layer.enter, residual)
                hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
            after = functools.partial(layer.leave, records)  # after the hook of capture, which was there first
            hooks.enter_context(layer.layer.register_forward_hook(after, with_kwargs=True))
        for batch in check_batches(batches):
            model(batch)
            count += len(batch)
    seen = [layer.joined() for layer in measured.values() if layer.parts]
    if not seen:
        raise ValueError(f"no CBSA layer of {type(model).__name__} took part in its forward pass")
    return Certificate(seen, count, left_out)


class _Measured:
    """What is known of a layer so far: numbers of every batch."""

    def __init__(self, name: str, layer: CBSA) -> None:
        self.name, self.layer = name, layer
        basis = basis_of(layer).cpu()
        unit = torch.finfo(compute_dtype(basis.dtype)).eps  # orthonormal up to less is not orthonormal
        self.basis, self.limit = basis.double(), 4 * max(basis.shape) * unit
        self.deviation = _deviation(self.basis)
        self.stream: tuple[Residual, Tensor] | None = None
        self.parts: list[dict[str, Tensor | None]] = []
        self.mismatch = 0.0  # the largest of any image and head, in parts of what rounding explains

    def enter(self, residual: Residual, block: nn.Module, args: Any, kwargs: Any) -> None:
        """Note what the block around the layer is called with."""
        self.stream = residual, next(iter((*args, *kwargs.values())))

    def leave(
        self, records: dict[str, LayerRecord], layer: CBSA, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        """Measure what the layer put out, and forget it."""
        record, stream = records.pop(self.name), self.stream
        self.stream = None
        assert record.stages is not None, "of CBSA layers"
        weights = record.stages.broadcast_attention
        if layer.step != "certified":
            weights = _all_weights(layer, layer.heads(*args, **kwargs))  # in autocast, as the layer itself
        with no_autocast(output):
            step = self._in_heads(output)
            if record.token_mask is not None:
                step = zero_rows(step, record.token_mask.cpu())
            x: Tensor = next(iter((*args, *kwargs.values())))
            if layer.step == "certified":
                self.mismatch = max(self.mismatch, _mismatch(self, record, step, x, output))
            self.parts.append(
                {
                    **_representatives(layer, record.stages, weights.cpu().double(), step, output.dtype),
                    **self._tokens(record, step, stream, x),
                }
            )

    def _in_heads(self, x: Tensor) -> Tensor:
        """U_k^T x of ``(B, N, C)`` tokens or a feature map, ``(B, H, N, P)``, in float64 on the CPU."""
        tokens, _ = as_tokens(x.cpu().double(), self.layer.dim, self.layer.channels_first)
        return (tokens @ self.basis.T).unflatten(-1, (self.layer.num_heads, -1)).transpose(1, 2)

    def _tokens(
        self, record: LayerRecord, step: Tensor, stream: tuple[Residual, Tensor] | None, normed: Tensor
    ) -> dict[str, Tensor | None]:
        """Rates of all tokens before and after the step, ``(B, H)``."""
        mask = None if record.token_mask is None else record.token_mask.cpu()

        def rate(x: Tensor) -> Tensor:
            return ops.coding_rate(x, eps=self.layer.eps, token_mask=mask)

        w = record.tokens.cpu().double()
        rates: dict[str, Tensor | None] = {"tokens_before": rate(w), "tokens_after": rate(w + step)}
        if stream is None:
            return {**rates, "stream_before": None, "stream_after": None}
        residual, x = stream
        before = self._in_heads(x)
        start = self._in_heads(normed) if residual == "norm" else before  # neither with the projection's bias
        return {**rates, "stream_before": rate(before), "stream_after": rate(start + step)}

    def joined(self) -> LayerCertificate:
        """The numbers of all batches."""
        broken = None
        if self.layer.step == "certified" and not self.deviation <= self.limit:
            broken = (
                f"its bases are not orthonormal: |U U^T - I| is {self.deviation:.1e}, above {self.limit:.1e}"
            )
        elif self.mismatch > 1:
            broken = (
                "it puts out something else than its step (by a hook, or products in TF32): the difference is "
                f"{self.mismatch:.1e} times what rounding explains"
            )
        whole: dict[str, Any] = {}
        for key in self.parts[0]:
            values = [part[key] for part in self.parts]
            known = [value for value in values if value is not None]
            whole[key] = torch.cat(known) if len(known) == len(values) else None  # of all calls or of none
        if broken:
            whole["guaranteed"] = None
        return LayerCertificate(self.name, self.layer.step, broken, self.deviation, self.limit, **whole)


def _mismatch(measured: _Measured, record: LayerRecord, step: Tensor, x: Tensor, output: Tensor) -> float:
    """How far the layer's output is from its step, in parts of what rounding explains, in the worst head.

    Frobenius norms of every image and head; what lies in no subspace counts in every head. The output is
    rounded by u of its precision. The step kappa B^T C changes by at most about 2 |dW| for a change dW of the
    tokens W, since kappa |B|^2 < 2, and by 2 |dA| / |A| |W| for one of the attention; a softmax has the
    relative error u times its largest logit. Solving for C adds v cond / (2 sqrt(alpha)), v the precision of
    the solution. What is not finite is not compared: there nothing holds anyway.

    Args:
        measured: the layer, with a certified step.
        record: its evaluation.
        step: ``(B, H, N, P)`` the output in the subspaces, zero at masked tokens.
        x: the layer's input. output: its output, both as passed.
    """
    layer, stages = measured.layer, record.stages
    assert stages is not None, "of CBSA layers"
    mask = None if record.token_mask is None else record.token_mask.cpu()
    expected = stages.output.cpu().double()
    expected = expected if mask is None else zero_rows(expected, mask)
    w, reps, first = (t.cpu().double() for t in (record.tokens, stages.extracted, stages.representatives))

    def norm(t: Tensor) -> Tensor:
        return t.square().sum((-2, -1)).sqrt()  # (B, H)

    def longest(t: Tensor) -> Tensor:
        return t.square().sum(-1).amax(-1).sqrt()

    def real(t: Tensor) -> Tensor:
        tokens, _ = as_tokens(t.detach().cpu().double(), layer.dim, layer.channels_first)
        return tokens if mask is None else tokens.masked_fill(~mask[..., None], 0.0)

    def whole(t: Tensor) -> Tensor:
        return norm(real(t))[:, None]

    logits = longest(w) * longest(first) * w.shape[-1] ** -0.5
    count = reps.shape[-2]
    if stages.representative_mask is not None:
        count = stages.representative_mask.cpu().sum(-1).clamp(min=1)[:, None]  # type: ignore[assignment]
    alpha = w.shape[-1] / (count * layer.eps**2)
    unit, solving = torch.finfo(stages.extracted.dtype).eps, torch.finfo(solve_dtype(stages.extracted)).eps
    solved = (1 + alpha * norm(reps).square()) / (2 * alpha**0.5)
    # What is projected has the rounding errors of all its channels.
    rounding = torch.finfo(output.dtype).eps * whole(output) + unit * (1 + logits) * (whole(x) + norm(w))
    rounding = MISMATCH * (rounding + solving * solved * (-stages.step.cpu().double()).sqrt())
    outside = norm(real(output) - step.transpose(1, 2).flatten(2) @ measured.basis)[:, None]
    return ((norm(step - expected) + outside) / rounding).nan_to_num(0.0).amax().item()


def _all_weights(layer: CBSA, heads: Heads) -> Tensor:
    """B ``(B, H, N, M)`` of a free step, whose stages hold the attention alone: that of a certified one."""
    eta = 1.0 if layer.step_representatives is None else layer.step_representatives
    inputs = certified_inputs(
        heads.queries,
        layer._represent(heads),
        fraction=0.5,
        eps=layer.eps,
        step_representatives=eta,
        token_mask=heads.source.token_mask,
        num_prefix_tokens=layer._first_represented(heads.source),
    )
    return cbsa_stages(inputs).broadcast_attention


def _representatives(
    layer: CBSA, stages: CBSAStages, weights: Tensor, step: Tensor, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """Rates of the representatives before and after ``step``, and what is guaranteed of them, ``(B, H)``.

    Args:
        layer: the layer.
        stages: its evaluation.
        weights: ``(B, H, N, M)`` B.
        step: ``(B, H, N, P)`` what the layer adds to the tokens in its subspaces.
        dtype: of the layer's output.
    """
    mask = None if stages.representative_mask is None else stages.representative_mask.cpu()
    x = zero_rows(stages.extracted.cpu().double(), mask)
    m, p = x.shape[-2:]
    count = x.new_tensor(m) if mask is None else mask.sum(-1).clamp(min=1).double()[:, None]
    alpha = p / (count * layer.eps**2)  # () or (B, 1)
    before, largest = _rate(x, alpha)
    after, _ = _rate(x + weights.mT @ step, alpha)
    gram = weights.mT @ weights if m <= weights.shape[2] else weights @ weights.mT
    norm = _over_finite(lambda g: torch.linalg.eigvalsh(g)[..., -1].clamp(min=0), gram)
    unit = max(torch.finfo(dtype).eps, torch.finfo(stages.extracted.dtype).eps)
    found: dict[str, Tensor | None] = {
        "before": before,
        "after": after,
        "norm": norm,
        "rounding": ROUNDING * min(m, p) * unit * (1 + alpha * largest**2).sqrt(),
        **dict.fromkeys(("guaranteed", "share", "bound")),
    }
    if layer.step_logit is None:
        return found
    kappa = -stages.step.cpu().double()  # (B, H)
    fraction = layer.step_logit.detach().cpu().double().sigmoid()
    update = weights @ contract_exact(x, layer.eps, mask)  # (B, H, N, P), its square is tr(C^T G C)
    share = kappa * norm / 2
    found["share"] = share
    found["guaranteed"] = alpha * kappa * (1 - share) * update.square().sum((-2, -1))
    found["bound"] = torch.where(kappa == 0, 0.0, 2 * fraction / kappa)
    return found


def _rate(x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """1/2 log det(I + alpha X X^T) of ``(B, H, M, P)``, and |X|, both ``(B, H)``, from singular values."""
    values = _over_finite(torch.linalg.svdvals, x)  # (B, H, min(M, P))
    return (alpha[..., None] * values.square()).log1p().sum(-1) / 2, values[..., 0]


def _over_finite(function: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """``function`` of matrices, NaN for those that are not finite, which LAPACK refuses."""
    broken = ~matrices.isfinite().all(-1).all(-1)
    values = function(matrices.masked_fill(broken[..., None, None], 0.0))
    return values.masked_fill(broken.view(broken.shape + (1,) * (values.ndim - broken.ndim)), math.nan)


def _deviation(basis: Tensor) -> float:
    """|U U^T - I|, the spectral norm, of rows ``(H * P, C)``; NaN if they are not finite."""
    defect = basis @ basis.T - torch.eye(len(basis), dtype=basis.dtype)
    return _over_finite(lambda d: torch.linalg.eigvalsh(d).abs().amax(-1), defect).item()


def _no_basis(layer: CBSA) -> str | None:
    """Why tokens, representatives and output are not all in one basis per head; None if they are."""
    if not layer.shared_qkv:
        return "queries, keys and values have bases of their own"
    if layer.proj is not None and layer.proj.out_features != layer.dim:
        return f"its output has {layer.proj.out_features} channels, its input {layer.dim}"
    return None


def _residual(block: nn.Module) -> Residual | None:
    """What a block adds its attention's output to; None if it does not say, or scales the output."""
    if isinstance(block, ResidualBlock):
        return "input"
    residual: Any = getattr(block, "residual", None)
    return residual if residual in RESIDUALS and getattr(block, "step", None) is None else None
