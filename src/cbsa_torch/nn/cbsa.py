"""CBSA as a layer: projections around :func:`cbsa_torch.ops.cbsa`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cbsa_torch._core.checks import check_choice, exact_eps
from cbsa_torch._core.linear import call_changes, is_plain_linear
from cbsa_torch._core.precision import is_autocast, no_autocast
from cbsa_torch._core.types import (
    CONTRACTIONS,
    IMPLS,
    QKV,
    STEPS,
    CBSAStages,
    Contraction,
    Impl,
    Layout,
    RepresentativeKind,
    Representatives,
    Step,
    Strategy,
)
from cbsa_torch.nn.mixer import TokenMixer
from cbsa_torch.nn.representatives import PrincipalDirections
from cbsa_torch.nn.scripted import ScriptedCBSA, not_scriptable
from cbsa_torch.nn.tokens import Heads, MixerInput
from cbsa_torch.ops import counting
from cbsa_torch.ops.cbsa.api import run, run_and_project
from cbsa_torch.ops.cbsa.inputs import CBSAInputs, cbsa_inputs, certified_inputs
from cbsa_torch.ops.cbsa.reference import cbsa_stages

_CERTIFIED: dict[str, Any] = {
    **{"contraction": "exact", "tied": True, "orthogonal": True, "qkv": "shared"},
    **{"qk_norm": False, "scale_norm": False, "proj_drop": 0.0},
}
"""What a certified step needs of the options."""


class CBSA(TokenMixer):
    """Contract-and-Broadcast Self-Attention: linear-time attention as a gradient step of a coding rate.

    Project tokens into H subspaces, extract M representatives by cross-attention (Eq. 5), contract them
    (Eq. 7 or 8), broadcast the contractions back with the same attention matrix, project out. The output is
    the update of Eq. 6: use it as ``x + CBSA(norm(x))``.

    Args:
        dim: channels of input and output.
        num_heads: number of subspaces H.
        num_representatives: M of ``"pool"`` (the grid closest in aspect with at most this many cells, never
            more than there are tokens) and of ``"learned"``. Default: 64. Of ``"pool"`` also a tuple, the cells
            along each axis at any aspect, e.g. ``(8, 8)`` as in the official code, but never more than there
            are tokens along the axis. The other kinds make as many as they make, and refuse it.
        representatives: ``"pool"`` (over the tokens' grid or, with ``coords``, the occupied cells of a
            lattice), ``"learned"`` (parameters; no grid needed), ``"tokens"`` (all of them: MSSA (9), O(N^2)),
            ``"principal"`` (principal directions: with the exact contraction, linear attention (12)),
            ``"basis"`` (the standard basis: channel attention (13)), or a function or module of your own: see
            :mod:`cbsa_torch.nn.representatives`.
        step: ``"free"``: kappa is learned, any sign. ``"relative"``: kappa is learned in units of N / M, tokens
            per representative, of every item. The weights of N tokens in a representative add up to 1, so that
            a free step moves a token by about M / N; this one moves it as far in sets of any size.
            ``"certified"``: for every input and in every head, the coding rate of the representatives provably
            does not rise, see :func:`cbsa_torch.ops.certified_cbsa`. That needs ``contraction="exact"``,
            ``tied`` and ``orthogonal``, which are then the defaults, and refuses what would break it
            (``proj_drop``, ``scale_norm``, ``qkv="separate"``). Autocast has no effect on such a layer.
        contraction: ``"softmax"`` (Eq. 8), ``"exact"`` (Eq. 7), ``"none"``. Default: ``"softmax"``, of a
            certified step ``"exact"``.
        tied: project out by the transpose of the input projection (CBSA-dagger). Default: False, of a
            certified step True.
        orthogonal: keep the rows of the input projection orthonormal. Default: as ``tied``.
        eps: quantisation precision epsilon of the exact contraction. Default: 0.1, of a certified step the
            root of ``head_dim``.
        qkv: ``"shared"``: one projection is query, key and value, the subspace bases U_k of the paper;
            ``"separate"``: three, as in a ViT (representatives are made from the queries).
        layout: ``"standard"`` pools the grid tokens. ``"official"`` pools all but the last
            ``num_prefix_tokens`` tokens, as the released checkpoints were trained, although prefix tokens
            come first there too. The released code's 8 x 8 cells at any aspect are another option:
            ``num_representatives=(8, 8)``.
        impl: implementation of the operator, see :func:`cbsa_torch.ops.cbsa`.
        **options: of every mixer: ``head_dim``, prefix tokens and grid, timm's arguments, device and dtype; see
            :class:`cbsa_torch.nn.TokenMixer`.

    Attributes:
        qkv: the input projection.
        proj: the output projection (None if tied).
        step_tokens: kappa, ``(H,)``, learned, any sign, drawn from a standard normal as in the official code
            (None if the step is certified).
        step_representatives: eta, likewise (None for representatives that bring their attention with them).
        step_logit: ``(H,)``, learned, 0 at first: its sigmoid is kappa in parts of the certified limit. None if
            the step is free.

    Shape:
        ``(B, N, C)`` tokens, prefix tokens first, or ``(B, C, *grid)`` with a 1-, 2- or 3-D grid; the
        output has the layout of the input.

    Examples:
        >>> from cbsa_torch import CBSA
        >>> layer = CBSA(384, num_heads=6)
        >>> layer(torch.randn(2, 1 + 14 * 14, 384)).shape  # a class token before a square grid
        torch.Size([2, 197, 384])
        >>> layer(torch.randn(2, 384, 20, 30)).shape  # a feature map
        torch.Size([2, 384, 20, 30])
    """

    shards = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_representatives: int | Sequence[int] | None = None,
        representatives: RepresentativeKind | Strategy = "pool",
        step: Step = "free",
        contraction: Contraction | None = None,
        tied: bool | None = None,
        orthogonal: bool | None = None,
        eps: float | None = None,
        qkv: QKV = "shared",
        layout: Layout = "standard",
        impl: Impl = "auto",
        **options: Any,
    ) -> None:
        check_choice("step", step, STEPS)
        if contraction is not None:
            check_choice("contraction", contraction, CONTRACTIONS)
        check_choice("impl", impl, IMPLS)
        certified = step == "certified"
        if certified:
            given = {"contraction": contraction, "tied": tied, "orthogonal": orthogonal, "qkv": qkv}
            _check_certified({**options, **given}, impl)
        contraction = ("exact" if certified else "softmax") if contraction is None else contraction
        tied, orthogonal = (certified if option is None else option for option in (tied, orthogonal))
        if not certified or eps is not None:
            eps = exact_eps(eps, contraction)
        super().__init__(dim, num_heads, qkv=qkv, tied=tied, orthogonal=orthogonal, **options)
        self.step: Step = step
        self.contraction: Contraction = contraction
        self.eps = self.head_dim**0.5 if eps is None else eps
        self.impl: Impl = impl
        self._make_representatives(representatives, num_representatives, layout)
        self.step_tokens = None if certified else self._per_head()
        self.step_logit = self._per_head() if certified else None
        self.step_representatives: nn.Parameter | None = None
        if isinstance(self.representatives, PrincipalDirections) and self.contraction == "softmax":
            raise ValueError(
                "representatives='principal' needs contraction='exact' or 'none': the signs of principal "
                "directions are arbitrary, and the softmax contraction depends on them"
            )
        if getattr(self.representatives, "gives_attention", False):
            if qkv == "separate":
                raise ValueError("representatives that bring their attention need qkv='shared'")
        else:
            self.step_representatives = self._per_head()
        self._reset_steps()

    def _reset_steps(self) -> None:
        if self.step_tokens is not None:
            nn.init.normal_(self.step_tokens)
        if self.step_logit is not None:
            nn.init.zeros_(self.step_logit)
        if self.step_representatives is not None:
            nn.init.normal_(self.step_representatives)

    def project(self, source: MixerInput) -> Heads:
        """Into the subspaces; for a certified step by bases that autocast does not round."""
        if self.step != "certified" or not is_autocast(source.x):
            return super().project(source)
        with no_autocast(source.x):
            assert self.step_logit is not None, "of certified steps"
            dtype = self.step_logit.dtype
            return super().project(source._replace(x=source.x.to(dtype)))

    def _represent(self, heads: Heads) -> Representatives:
        """Initial guesses; for a certified step without autocast in what a strategy does, either."""
        if self.step != "certified":
            return super()._represent(heads)
        with no_autocast(heads.queries):
            return super()._represent(heads)

    def mix(self, heads: Heads) -> Tensor:
        """Apply :func:`cbsa_torch.ops.cbsa` or, for a certified step, :func:`cbsa_torch.ops.certified_cbsa`."""
        return run(self._inputs(heads), self.impl)

    def mix_and_project(self, heads: Heads) -> Tensor:
        """Hand the output projection to the operator where nothing comes between."""
        between = not isinstance(self.norm, nn.Identity) or bool(call_changes(self.norm))
        if between or not (self.proj is None or is_plain_linear(self.proj)):
            if self.step != "certified":
                return super().mix_and_project(heads)
            with no_autocast(heads.queries):
                return super().mix_and_project(heads)
        if self.proj is None:
            assert heads.basis is not None, "projections are tied"
            return run_and_project(self._inputs(heads), heads.basis.t(), None, self.impl)
        return run_and_project(self._inputs(heads), self.proj.weight, self.proj.bias, self.impl)

    def stages(self, *args: Any, **kwargs: Any) -> CBSAStages:
        """Every intermediate of :meth:`forward`, called like this, computed eagerly, per head."""
        return self.stages_in(self.heads(*args, **kwargs))

    def stages_in(self, heads: Heads) -> CBSAStages:
        """:meth:`stages` from the tokens in their subspaces, see :meth:`heads`."""
        return cbsa_stages(self._inputs(heads))

    def count_heads(self, heads: Heads) -> counting.Counts:
        """Count making the representatives, extraction, contraction, the limit of a step, and broadcast."""
        chosen = self._represent(heads)
        n, m = heads.queries.shape[2], chosen.values.shape[2]
        grams = 0 if self.step != "certified" else 1 if chosen.token_weights is None else 2
        sizes = {"num_heads": self.num_heads, "head_dim": self.head_dim}
        extracted = self.step_representatives is not None
        counts = counting.cbsa(n, m, contraction=self.contraction, extracted=extracted, grams=grams, **sizes)
        count_strategy = getattr(self.representatives, "counts", None)
        return counts if count_strategy is None else counts + count_strategy(n, **sizes)

    def scripted_operator(self) -> nn.Module:
        """Eq. 5, 7 or 8, and the broadcast."""
        if self.step_tokens is None or self.step_representatives is None:
            raise not_scriptable(self, "representatives must be 'pool' or 'learned', the step not certified")
        steps = self.step_tokens, self.step_representatives
        made = self._scripted_representatives()
        return ScriptedCBSA(made, *steps, self.contraction, self.eps, self.step == "relative")

    def _inputs(self, heads: Heads) -> CBSAInputs:
        """The operator's inputs: tokens in the heads, representatives, options."""
        chosen = self._represent(heads)
        if (chosen.attention is None) != (self.step_representatives is not None):
            raise ValueError(
                "representatives must set gives_attention = True if and only if they return an attention, "
                f"got {'none' if chosen.attention is None else 'one'}"
            )
        parallel = heads.source.parallel
        if self.step_logit is not None:
            eta = 1.0 if self.step_representatives is None else self.step_representatives
            return certified_inputs(
                heads.queries,
                chosen,
                fraction=self.step_logit.sigmoid(),
                eps=self.eps,
                step_representatives=eta,
                token_mask=heads.source.token_mask,
                num_prefix_tokens=0 if parallel is not None else self._first_represented(heads.source),
                parallel=parallel,
            )
        assert self.step_tokens is not None
        options: dict[str, Any] = {
            "step_tokens": self.step_tokens,
            "contraction": self.contraction,
            "eps": self.eps,
            "token_mask": heads.source.token_mask,
            "representative_mask": chosen.mask,
            "parallel": parallel,
        }
        if chosen.attention is not None:
            options["attention"] = chosen.attention
        else:
            options |= {"keys": heads.keys, "values": heads.values}
            options["step_representatives"] = self.step_representatives
        inputs = cbsa_inputs(heads.queries, chosen.values, **options)
        # PyTorch 2.8 does not compile _replace: only where it is needed.
        return inputs._replace(relative=True) if self.step == "relative" else inputs

    def extra_repr(self) -> str:
        """Show the options when the module is printed."""
        eps = f", eps={self.eps}" if self.contraction == "exact" else ""
        step = "" if self.step == "free" else f", step={self.step!r}"
        return f"{super().extra_repr()}{step}, contraction={self.contraction!r}{eps}, layout={self.layout!r}"


def _check_certified(options: dict[str, Any], impl: Impl) -> None:
    """Raise ``ValueError`` where an option that was given (not None) contradicts a certified step."""
    for name, needed in _CERTIFIED.items():
        given = options.get(name)
        if given is not None and given != needed:
            raise ValueError(
                f"{name} must be {needed!r} with step='certified', which guarantees a fall of the coding rate "
                f"for no other; got {given!r}"
            )
    if impl == "triton":
        raise ValueError("impl must be 'auto', 'tiled' or 'eager' with step='certified', got 'triton'")
