"""What a trained model's attention layers do: rates, certificates, ranks, noise on their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbsa_torch import CBSA, interpret, ops
from cbsa_torch._core.types import CBSAStages
from cbsa_torch.interpret.rates import rank_correlation
from cbsa_torch.nn import TokenMixer, WhiteBoxBlock
from cbsa_torch.ops.cbsa import certified as certified_ops
from cbsa_torch.train.run.folder import environment
from cbsa_torch.train.tasks.base import Trained

BOUNDS = ("gram", "product", "frobenius")
"""Bounds of the limit that are compared: see :class:`Guarantee`."""
SIGMAS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Standard deviations of the noise on the parameters of the attention layers (Fig. 8)."""


def measure(trained: Trained, count: int) -> dict[str, Any]:
    """Rates before and after each layer, in float64, certificates, robustness to noise on the parameters.

    All on at most ``count`` images of the test split.
    """
    images, labels = test_images(trained, count)
    double = trained.model.double().eval()
    batches = images.double().split(64)
    rates = interpret.measure_rates(double, batches)
    measured: dict[str, Any] = {
        "measured_images": len(images),
        "rate": rates.coding.rate,
        "rate_normalized": rates.coding.normalized,
        "step": step_effects(double, batches),
    }
    if rates.reduced is not None:
        measured["figure_6"] = {
            "W - A C": rates.reduced.correlation,
            "W + kappa A C": rates.reduced.correlation_learned,
            "A C": rates.reduced.correlation_output,
            "W + A C": rates.reduced.correlation_added,
        }
        measured["kappa"] = rates.reduced.step_tokens
        measured["gap"] = rates.reduced.gap  # |R(Q) - R(Z)|, Eq. 4
        ranks = interpret.attention_ranks(double, batches)
        measured["ranks"] = {"rank": ranks.rank, "effective": ranks.effective_rank}
    model = trained.model.float()
    if any(isinstance(layer, CBSA) and layer.step == "certified" for layer in model.modules()):
        measured["certificates"] = certificates(model, images)

    @torch.no_grad()
    def accuracy(module: nn.Module) -> float:
        return (module(images).argmax(-1) == labels).double().mean().item()

    noisy = interpret.robustness(model, accuracy, sigmas=SIGMAS)
    measured["robustness"] = {
        "clean": noisy.clean,
        **{str(s): v for s, v in zip(SIGMAS, noisy.values, strict=True)},
    }
    return {**rounded(measured), "measured_with": environment()}


def certificates(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """What :func:`cbsa_torch.interpret.certificate` finds of a float32 model, in each precision."""
    found = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32), ("bf16", torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
            whole = interpret.certificate(model.to(dtype), images.to(dtype)).record()
        found[name] = {key: whole[key] for key in ("cases", "holding", "beyond_rounding", "void", "share")}
    return found


def test_images(trained: Trained, count: int) -> tuple[Tensor, Tensor]:
    """Images of the test split, spread evenly over it, as the model is fed, and their classes."""
    dataset = trained.task.open_split(trained.spec.mode, trained.class_names, "test").dataset
    images, labels = trained.task.sample(dataset, trained.spec, count)
    return images, torch.tensor(labels)


class Fall(NamedTuple):
    """A rate before and after a layer's step, ``(images, heads)`` each."""

    before: Tensor
    after: Tensor

    def summary(self) -> dict[str, Any]:
        """Means over images of the sum over heads, and in how many cases the rate fell."""
        return {
            "before": self.before.sum(1).mean().item(),
            "after": self.after.sum(1).mean().item(),
            "fell": int((self.after < self.before).sum()),
            "cases": self.before.numel(),
        }


def step_effects(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Rates before and after the step that each layer really takes, whatever its form.

    With z = norm1(x), the tokens U_k^T (z + attn(z)) are compared with U_k^T z, and so are those of the
    stream, x + attn(z) with x; a block that carries z + attn(z) has z for its stream. Representatives after the
    step are made from the tokens after it by the weights that made them before it: of CBSA with pooled first
    guesses W Pi + eta W A with A as it was.

    Returns:
        ``layers``: for each the summaries of ``tokens``, ``stream`` and, of CBSA, ``representatives``
        (eps = 0.1, as in all figures) and ``representatives_own`` (the layer's own eps; 1 if it has none).
        ``correlation``: over layers and heads, the rank correlation of the reductions of tokens and
        representatives by this step.
    """
    seen: dict[str, list[dict[str, Any]]] = {}
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, WhiteBoxBlock)}
    calls: dict[str, tuple[Tensor, tuple[Any, ...], Tensor]] = {}
    streams: dict[str, Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, block in blocks.items():

            def keep_stream(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                streams[name] = args[0]

            def keep_call(_: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name) -> None:
                calls[name] = (args[0], args[1:], out)

            hooks.enter_context(block.norm1.register_forward_pre_hook(keep_stream))
            hooks.enter_context(block.attn.register_forward_hook(keep_call))
        for batch in batches:
            model(batch)
            done, calls, streams_done = dict(calls), {}, dict(streams)
            for name, (z, rest, update) in done.items():
                attn: Any = blocks[name].attn
                stream = z if blocks[name].residual == "norm" else streams_done[name]
                seen.setdefault(name, []).append(_layer_falls(attn, stream, z, update, rest))
    layers = []
    falls: dict[str, list[float]] = {"tokens": [], "representatives": []}
    for name, parts in seen.items():
        whole: dict[str, Any] = {
            key: type(first)(*map(torch.cat, zip(*(part[key] for part in parts), strict=True)))
            for key, first in parts[0].items()
        }
        promised = whole.pop("guarantee", None)
        layer = {"layer": name, **{key: fall.summary() for key, fall in whole.items()}}
        if promised is not None:
            layer["certificate"] = promised.summary(whole["representatives_own"])
        layers.append(layer)
        for key, values in falls.items():
            if key in whole:
                values += (whole[key].before - whole[key].after).mean(0).tolist()
    reductions = falls["representatives"] and rank_correlation(falls["tokens"], falls["representatives"])
    return {"layers": layers, "correlation": reductions or None}


def _layer_falls(
    attn: TokenMixer, x: Tensor, z: Tensor, update: Tensor, rest: tuple[Any, ...]
) -> dict[str, Any]:
    """The rates of one layer on one batch."""

    def tokens(features: Tensor) -> Tensor:
        return ops.coding_rate(attn.heads(features, *rest).queries.contiguous())

    falls: dict[str, Any] = {
        key: Fall(tokens(t), tokens(t + update)) for key, t in (("tokens", z), ("stream", x))
    }
    if not isinstance(attn, CBSA) or attn.step_representatives is None:
        return falls
    first, second = attn.stages(z, *rest), attn.stages(z + update, *rest)
    eta = attn.step_representatives[:, None, None]
    after = second.representatives + eta * (first.attention @ second.tokens)
    own = attn.eps if attn.contraction == "exact" else 1.0
    for key, eps in (("representatives", 0.1), ("representatives_own", own)):
        falls[key] = Fall(ops.coding_rate(first.extracted, eps=eps), ops.coding_rate(after, eps=eps))
    if attn.step == "certified":
        falls["guarantee"] = guarantee(first, attn.eps, eta)
    return falls


class Guarantee(NamedTuple):
    """What the theorem says of a certified step, ``(images, heads)`` each."""

    fall: Tensor
    """The rate of the representatives falls by at least alpha kappa (1 - kappa |G| / 2) tr(C^T C G)."""
    fraction: Tensor
    """kappa |G| / 2 with the spectral norm of G = B^T B: the theorem holds below 1."""
    gram: Tensor
    product: Tensor
    frobenius: Tensor
    """|G| in parts of its bounds: the largest sum_j |G_ij| (G_jj / G_ii)^1/2; |B|_1 |B|_inf; and
    ((|Pi|_1 |Pi|_inf)^1/2 + |eta| |A|_F)^2."""

    def summary(self, measured: Fall) -> dict[str, Any]:
        """In how many cases the rate fell by what is guaranteed, up to 1e-9 of it, and how far the steps go."""
        real = measured.before - measured.after
        holds = real >= self.fall - 1e-9 * measured.before
        quarter = self.fraction.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        return {
            "holds": int(holds.sum()),
            "cases": holds.numel(),
            "fraction_quartiles": quarter.tolist(),
            "median_fall": real.median().item(),
            "median_guaranteed": self.fall.median().item(),
            "tightness": {name: getattr(self, name).median().item() for name in BOUNDS},
        }


def guarantee(stages: CBSAStages, eps: float, eta: Tensor) -> Guarantee:
    """The guaranteed fall of a certified step, and how tight bounds of its limit are; ``eta`` ``(H, 1, 1)``."""
    c, b, kappa = stages.contracted, stages.broadcast_attention, -stages.step  # (B, H, M, P), (B, H, N, M)
    m, p = c.shape[-2:]
    gram = b.mT @ b
    norm = torch.linalg.matrix_norm(gram, 2)
    fraction = kappa * norm / 2
    fall = p / (m * eps**2) * kappa * (1 - fraction) * (c * (gram @ c)).sum((-2, -1))
    own = eta * stages.attention.mT

    def by_sums(weights: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(weights, 1) * torch.linalg.matrix_norm(weights, torch.inf)

    frobenius = (by_sums(b - own).sqrt() + torch.linalg.matrix_norm(own)).square()
    bounds = (certified_ops.largest_eigenvalue_bound(gram), by_sums(b), frobenius)
    return Guarantee(fall, fraction, *(norm / bound for bound in bounds))


def rounded(value: Any) -> Any:
    """The same with numbers to six digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
