"""What is known of certified steps: the numbers of every layer, counts over a model, their table and JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerCertificate:
    """What one CBSA layer did to every image, per head: ``(images, H)`` float64 tensors on the CPU, in nats.

    W = U_k^T norm(x), plus the projection's bias if it has one, are the tokens that head k receives,
    X = B W + constant their M representatives with the weights B, and W+ = W + U_k^T y the tokens with the
    output y that the layer really put out. Rates are at the layer's epsilon. One image and head is a case; an
    image without any real token is none.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import certificate
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1, step="certified").eval()
        >>> layer = certificate(model, torch.randn(2, 1, 8, 8)).layers[0]
        >>> layer.broken is None, layer.guaranteed.shape, bool(layer.holds.all())
        (True, torch.Size([2, 4]), True)
    """

    name: str
    """The layer's name in the model."""
    step: str
    """``"certified"``, ``"free"`` or ``"relative"``."""
    broken: str | None
    """Why the theorem does not apply to a certified step here (its bases are not orthonormal, or the layer puts
    out something else than its step, in any image and head); None if it does, and of a free step."""
    deviation: float
    """|U U^T - I|, the spectral norm, of the bases of all heads as rows: 0 if they are orthonormal."""
    deviation_limit: float
    """The deviation above which there is no certificate: 4 max(H P, C) u, u the spacing of numbers near 1 in
    the precision of the bases, float32 or better."""
    before: Tensor
    """R(X), the rate of the representatives."""
    after: Tensor
    """R(X+), X+ = B W+ + constant, with the weights B held."""
    guaranteed: Tensor | None
    """alpha kappa (1 - kappa |G| / 2) tr(C^T G C), G = B B^T: by how much the rate falls at least. None if the
    step is free or the certificate broken."""
    rounding: Tensor
    """By how much less it may fall because of rounding: 8 min(M, P) u sqrt(cond), cond = 1 + alpha |X|^2 the
    condition number of the contraction, u the spacing of numbers near 1 in the layer's precision."""
    share: Tensor | None
    """kappa |G| / 2: kappa in parts of the largest for which the theorem holds. None of a free step."""
    norm: Tensor
    """|G|, the largest eigenvalue."""
    bound: Tensor | None
    """The bound of |G| by which the layer chose kappa. None of a free step."""
    tokens_before: Tensor
    """R(W) of all tokens that the layer receives; nothing is guaranteed of them."""
    tokens_after: Tensor
    """R(W+)."""
    stream_before: Tensor | None
    """R(U_k^T x), x the input of the block around the layer, without the projection's bias. None if any call of
    the layer is without a block that says what its update is added to."""
    stream_after: Tensor | None
    """The same of what the block goes on with: x + y, or norm(x) + y with ``residual="norm"``."""

    @property
    def cases(self) -> Tensor:
        """``(images, H)`` bool: whether there was a step at all."""
        return self.norm != 0

    @property
    def holds(self) -> Tensor | None:
        """``(images, H)`` bool: whether the rate fell by what is guaranteed; None of a free step."""
        if self.share is None:
            return None
        if self.guaranteed is None:
            return torch.zeros_like(self.cases)
        fell = self.before - self.after >= self.guaranteed - self.rounding
        return fell & (self.share >= 0) & (self.share < 1)

    @property
    def beyond_rounding(self) -> Tensor | None:
        """``(images, H)`` bool: whether more is guaranteed than rounding may take away; None if nothing is."""
        return None if self.guaranteed is None else self.cases & (self.guaranteed > self.rounding)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON: ``[head]`` lists of means or medians over images; None if not finite."""
        cases = self.cases

        def mean(values: Tensor | None) -> list[float | None] | None:
            return None if values is None else _finite(values.mean(0))

        def median(values: Tensor | None) -> list[float | None] | None:
            return None if values is None else _finite(values.masked_fill(~cases, math.nan).nanmedian(0).values)

        margin = None if self.guaranteed is None else self.before - self.after - self.guaranteed
        return {
            "name": self.name,
            "step": self.step,
            "broken": self.broken,
            "deviation": self.deviation if math.isfinite(self.deviation) else None,
            "deviation_limit": self.deviation_limit,
            "cases": cases.sum(0).tolist(),
            "holds": None if self.holds is None else (self.holds & cases).sum(0).tolist(),
            "before": mean(self.before),
            "after": mean(self.after),
            "guaranteed": mean(self.guaranteed),
            "least_margin": None if margin is None else _finite(margin.amin(0)),
            "largest_rounding": _finite(self.rounding.amax(0)),
            "share": median(self.share),
            "largest_share": None if self.share is None else _finite(self.share.amax(0)),
            "norm": median(self.norm),
            "bound": median(self.bound),
            "tokens_before": mean(self.tokens_before),
            "tokens_after": mean(self.tokens_after),
            "tokens_fell": ((self.tokens_after < self.tokens_before) & cases).sum(0).tolist(),
            "stream_before": mean(self.stream_before),
            "stream_after": mean(self.stream_after),
        }


@dataclass(frozen=True, eq=False)
class Certificate:
    """What every CBSA layer of a model did to every image; ``print`` shows it as a table.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import certificate
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1, step="certified").eval()
        >>> found = certificate(model, torch.randn(2, 1, 8, 8))
        >>> len(found.certified), found.void, round(found.share, 2)
        (1, 0, 0.48)
    """

    layers: list[LayerCertificate]
    """In the order of the model."""
    images: int
    """How many were measured."""
    left_out: dict[str, str]
    """CBSA layers that cannot be measured, and why."""

    @property
    def certified(self) -> list[LayerCertificate]:
        """The layers whose step is certified."""
        return [layer for layer in self.layers if layer.step == "certified"]

    @property
    def cases(self) -> int:
        """The number of cases, layer by image by head, of certified steps."""
        return sum(int(layer.cases.sum()) for layer in self.certified)

    @property
    def holding(self) -> int:
        """In how many of them the rate fell by what is guaranteed."""
        return sum(
            int((layer.holds & layer.cases).sum()) for layer in self.certified if layer.holds is not None
        )

    @property
    def beyond_rounding(self) -> int:
        """In how many of them more is guaranteed than rounding may take away; in others it shows nothing."""
        found = [layer.beyond_rounding for layer in self.certified]
        return sum(int(cases.sum()) for cases in found if cases is not None)

    @property
    def void(self) -> int:
        """How many of them are of layers whose certificate is broken."""
        return sum(int(layer.cases.sum()) for layer in self.certified if layer.broken)

    @property
    def compressed(self) -> int:
        """In how many of them the rate of all tokens fell, in norm(x); nothing is guaranteed of that."""
        return sum(int(((x.tokens_after < x.tokens_before) & x.cases).sum()) for x in self.certified)

    @property
    def share(self) -> float:
        """The median of kappa in parts of its limit, over cases that are not void; NaN without any."""
        sound = [layer for layer in self.certified if not layer.broken]
        shares = [layer.share[layer.cases] for layer in sound if layer.share is not None]
        return torch.cat(shares).nanmedian().item() if self.cases > self.void else math.nan

    def record(self) -> dict[str, Any]:
        """The numbers for JSON: plain values; per layer those of :meth:`LayerCertificate.record`."""
        share = self.share
        return {
            "images": self.images,
            "cases": self.cases,
            "holding": self.holding,
            "beyond_rounding": self.beyond_rounding,
            "void": self.void,
            "compressed": self.compressed,
            "share": share if math.isfinite(share) else None,
            "layers": [layer.record() for layer in self.layers],
            "left_out": self.left_out,
        }

    def __str__(self) -> str:
        """A row for each layer; rates are sums over heads, means over images, in nats."""
        head = ("layer", "representatives", "guaranteed", "holds", "of the limit", "tokens", "stream")
        rows = [head, *map(_row, self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines += [f"{layer.name}: not certified, {layer.broken}" for layer in self.layers if layer.broken]
        lines += [f"{name}: left out, {reason}" for name, reason in self.left_out.items()]
        return "\n".join(line.rstrip() for line in lines)


def _row(layer: LayerCertificate) -> tuple[str, ...]:
    """A row of the table about a layer."""

    def rates(before: Tensor | None, after: Tensor | None) -> str:
        return "-" if before is None or after is None else f"{_total(before)} -> {_total(after)}"

    holds, cases = layer.holds, layer.cases
    count, share = int(cases.sum()), "-"
    if layer.share is not None:
        share = f"{100 * layer.share[cases].nanmedian().item():.0f} %" if count else "-"
    held = "not certified" if holds is None else f"{int((holds & cases).sum())} of {count}"
    if layer.beyond_rounding is not None and (shown := int(layer.beyond_rounding.sum())) < count:
        held += f" ({shown} beyond rounding)"
    return (
        layer.name,
        rates(layer.before, layer.after),
        "nothing" if layer.guaranteed is None else f"<= {_total(layer.before - layer.guaranteed)}",
        held,
        share,
        rates(layer.tokens_before, layer.tokens_after),
        rates(layer.stream_before, layer.stream_after),
    )


def _total(rates: Tensor) -> str:
    return f"{rates.sum(1).mean().item():.2f}"


def _finite(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
