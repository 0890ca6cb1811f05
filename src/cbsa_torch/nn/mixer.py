"""What every token mixer shares: reading the input, projecting into subspaces and out of them.

A mixer is this and one function of :mod:`cbsa_torch.ops` between the projections.
"""

from __future__ import annotations

import abc
import copy
import copyreg
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cbsa_torch._core.autodiff import is_transformed
from cbsa_torch._core.checks import check_bool, check_choice, check_positive_int
from cbsa_torch._core.compiler import not_compiled
from cbsa_torch._core.fx import fx_leaf
from cbsa_torch._core.linear import apply_with_matrix, is_plain_linear, why_not_drawn
from cbsa_torch._core.types import (
    LAYOUTS,
    QKV,
    QKVS,
    Cells,
    GridSize,
    Layout,
    RepresentativeKind,
    Representatives,
    Strategy,
)
from cbsa_torch.nn.grid_hook import has_grid_hook, install_grid_hook_once
from cbsa_torch.nn.orthonormal import OrthonormalLinear, check_no_adapter, is_orthonormal
from cbsa_torch.nn.packing import Packing, read_packed, restore_packed
from cbsa_torch.nn.reading import TokenReader
from cbsa_torch.nn.representatives import (
    LearnedRepresentatives,
    PooledRepresentatives,
    make_representatives,
)
from cbsa_torch.nn.scripted import ScriptedMixer, ScriptedRepresentatives, not_scriptable
from cbsa_torch.nn.tokens import (
    Heads,
    MixerInput,
)
from cbsa_torch.ops import counting
from cbsa_torch.ops.coordinates import Coordinates
from cbsa_torch.ops.counting import Counts
from cbsa_torch.ops.parallel import ContextParallel

_STEPS = ("step_", "temperature")
"""Name prefixes of per-head parameters: step sizes and temperatures."""


class TokenMixer(TokenReader, abc.ABC):
    """Base of CBSA, MSSA, TSSA, LinearCBSA, AgentAttention and MHSA: projections around an operator.

    Args:
        dim: channels of input and output.
        num_heads: number of subspaces H.
        head_dim: dimension P of each subspace. Default: ``dim / num_heads``.
        tied: project out with the transpose of the input projection (the rigorous form; no bias in the
            output) instead of an independent linear layer.
        orthogonal: keep the rows of the input projection orthonormal: orthonormal bases U_k of disjoint
            subspaces, U_i^T U_j = 0 (a QR decomposition; float32 or float64 parameters). Needs one
            shared projection and ``num_heads * head_dim <= dim``.
        qkv: ``"shared"``: one projection is query, key and value, the subspace bases U_k of the paper;
            ``"separate"``: three, as in a ViT.
        num_prefix_tokens: class and register tokens before the grid tokens; they are attended to but not
            pooled. Default: what ``grid_size`` leaves, else 0 or 1, whichever leaves a square grid. Give it
            (or the grid) if your grids are not square: 1 + 2 x 4 tokens also look like 3 x 3.
        grid_size: the tokens' grid, if inputs are tokens of one known size; see :meth:`set_input_size`.
        channels_first: how to read a 3-D input: True = ``(B, C, L)``, False = ``(B, N, C)``, None = tokens
            if its last axis is ``dim``, else a 1-D feature map.
        attn_head_dim: timm's name for ``head_dim``. Default: that.
        dim_out: output channels. Default: ``dim``.
        qkv_bias, proj_bias: biases of the projections.
        qk_norm: normalise queries and keys per head with ``norm_layer``; needs separate projections.
        scale_norm: normalise the heads' joint output with ``norm_layer`` before projecting out.
        gated: not supported; raises.
        attn_drop: dropout rate of attention weights; only for mixers that compare tokens with tokens.
        proj_drop: dropout rate after the output projection.
        norm_layer: constructor of normalisation layers, for ``qk_norm`` and ``scale_norm``, which
            need it. Default: none.
        recompute: keep only the input for the backward pass, N * dim numbers, and compute the rest again there:
            a training step takes about a third longer. Without effect under ``torch.func``.
        device, dtype: of the parameters.

    Attributes:
        qkv: the input projection. proj: the output projection (None if tied). representatives: what makes
            them, of mixers that have some, else None. assumes_square: whether ``(B, N, C)`` tokens without a
            grid are read as a square. False for a layer that replaced another one inside a model, or was built
            while the hook of ``nn.install_grid_hook`` was removed: the model's grids may be others.

    Shape:
        ``(B, N, C)`` tokens, prefix tokens first, or ``(B, C, *grid)`` with a 1-, 2- or 3-D grid; the
        output has the layout of the input.

    Examples:
        >>> from cbsa_torch.nn import TokenMixer
        >>> from cbsa_torch.ops.counting import Counts
        >>> class Mean(TokenMixer):
        ...     def mix(self, heads):
        ...         return heads.values.mean(2, keepdim=True).expand_as(heads.values)
        ...
        ...     def count_heads(self, heads):
        ...         return Counts()
        >>> Mean(64, 4)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        tied: bool = False,
        orthogonal: bool = False,
        qkv: QKV = "shared",
        num_prefix_tokens: int | None = None,
        grid_size: GridSize | None = None,
        channels_first: bool | None = None,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        install_grid_hook_once()
        check_positive_int("dim", dim)
        check_positive_int("num_heads", num_heads)
        check_choice("qkv", qkv, QKVS)
        for option, value in (("recompute", recompute), ("tied", tied), ("orthogonal", orthogonal)):
            check_bool(option, value)
        if head_dim is not None and attn_head_dim is not None and head_dim != attn_head_dim:
            raise ValueError(f"head_dim ({head_dim}) and attn_head_dim ({attn_head_dim}) must agree")
        head_dim = attn_head_dim if head_dim is None else head_dim
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(
                    f"dim (={dim}) must be divisible by num_heads (={num_heads}), or pass head_dim"
                )
            head_dim = dim // num_heads
        check_positive_int("head_dim", head_dim)
        dim_out = dim if dim_out is None else dim_out
        check_positive_int("dim_out", dim_out)
        name = type(self).__name__
        if gated:
            raise ValueError(f"gated must be False: {name} has no output gate")
        if attn_drop and not self.compares_tokens:
            raise ValueError(
                f"attn_drop must be 0 for {name}, which has no N x N weights to drop; got {attn_drop}"
            )
        if qk_norm and qkv == "shared":
            raise ValueError("qk_norm needs qkv='separate': shared queries, keys and values are one tensor")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("norm_layer is required with qk_norm or scale_norm")
        if tied and (qkv == "separate" or dim_out != dim):
            raise ValueError("tied needs qkv='shared' and dim_out equal to dim: it reuses the input projection")
        inner = num_heads * head_dim
        if orthogonal and qkv == "separate":
            raise ValueError("orthogonal needs qkv='shared': one projection, whose rows are the bases")
        if orthogonal and inner > dim:
            most = max(1, dim // num_heads)
            fewer = "" if num_heads <= dim else f" and num_heads of at most {dim}"
            raise ValueError(
                f"orthogonal needs num_heads * head_dim (={inner}) at most dim (={dim}): there are no more "
                f"orthogonal directions; give a head_dim of at most {most}{fewer}"
            )

        self.dim = dim
        self.dim_out = dim_out
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.tied = tied
        self.orthogonal = orthogonal
        self.shared_qkv = qkv == "shared"
        self.recompute = recompute
        self.attn_drop = attn_drop
        self.assumes_square = has_grid_hook()
        self.set_input_size(grid_size, num_prefix_tokens)
        self.channels_first = channels_first

        linear = OrthonormalLinear if orthogonal else nn.Linear
        self.qkv = linear(dim, inner * (1 if self.shared_qkv else 3), qkv_bias, device, dtype)
        norms = [(head_dim, qk_norm), (head_dim, qk_norm), (inner, scale_norm)]
        self.q_norm, self.k_norm, self.norm = (
            norm_layer(size, device=device, dtype=dtype) if norm_layer and wanted else nn.Identity()
            for size, wanted in norms
        )
        self.proj = None if tied else nn.Linear(inner, dim_out, proj_bias, device, dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def with_options(cls, **options: Any) -> type[TokenMixer]:
        """Choose options for what takes a class, such as timm's ``attn_layer``.

        ``timm.create_model("vit_tiny_patch16_224", attn_layer=CBSA.with_options(representatives="learned"))``

        Args:
            **options: of the constructor. They go before those that it is called with. A module among them is
                copied for every layer.

        Returns:
            A subclass to be called, not subclassed: what it makes are instances of this class itself.
        """

        def new(_: type, *args: Any, **given: Any) -> TokenMixer:
            own = {k: copy.deepcopy(v) if isinstance(v, nn.Module) else v for k, v in options.items()}
            return cls(*args, **{**given, **own})

        def refuse(_: type) -> None:
            raise TypeError(f"a class made by with_options cannot be subclassed; subclass {cls.__name__}")

        # timm keeps the class in the model. It has no name to be found by, so it is pickled as how it was made,
        # for which pickle and copy look up the class of a class.
        kind = type(type(cls).__name__, (type(cls),), {})
        copyreg.pickle(kind, lambda _: (_with_options, (cls, options)))
        body = {"__new__": new, "__init_subclass__": classmethod(refuse), "__doc__": cls.__doc__}
        return kind(cls.__name__, (cls,), {**body, "__module__": cls.__module__})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew.

        Raises:
            ValueError: a layer that is an adapter, quantised or offloaded. Nothing is changed then.
        """
        orthonormal = self._orthonormal_layers()
        for name, module in self.named_modules():
            if name in orthonormal:
                continue
            reason = why_not_drawn(module)
            below = any(name.startswith(f"{layer}.") for layer in orthonormal)
            if not reason and not below and module._parameters and not hasattr(module, "reset_parameters"):
                reason = f"{type(module).__name__} has no reset_parameters"
            if reason:
                raise ValueError(
                    f"reset_parameters cannot draw {name or 'parameters'} of {type(self).__name__}: {reason}; "
                    "set it yourself"
                )
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        self._reset_steps()

    def _reset_steps(self) -> None:
        """Draw the parameters that the mixer itself holds."""

    def _per_head(self) -> nn.Parameter:
        """A new parameter ``(H,)`` on the device and in the dtype of the projections."""
        like = next(self.qkv.parameters())
        return nn.Parameter(torch.empty(self.num_heads, device=like.device, dtype=like.dtype))

    def step_names(self) -> list[str]:
        """Names of the mixer's own parameters with one number per head: step sizes and temperatures."""
        return [name for name, _ in self.named_parameters(recurse=False) if name.startswith(_STEPS)]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: step sizes, temperatures and orthonormal bases."""
        bases = (f"{name}.parametrizations.weight.original" for name in self._orthonormal_layers())
        return {*self.step_names(), *bases}

    def _orthonormal_layers(self) -> dict[str, nn.Linear]:
        found = ((n, m) for n, m in self.named_modules() if isinstance(m, nn.Linear))
        return {name: layer for name, layer in found if is_orthonormal(layer)}

    @fx_leaf
    def forward(
        self,
        x: Tensor,
        grid_size: GridSize | None = None,
        token_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        coords: Tensor | Coordinates | None = None,
        cu_seqlens: Tensor | Packing | None = None,
        grid_sizes: Sequence[GridSize] | None = None,
        parallel: ContextParallel | None = None,
    ) -> Tensor:
        """Mix the tokens.

        Args:
            x: ``(B, N, C)`` tokens, prefix tokens first, or a ``(B, C, *grid)`` feature map. With
                ``cu_seqlens``, ``(1, T, C)`` or ``(T, C)``, sequences one after the other, each beginning with
                its prefix tokens; or a nested tensor of ``torch.jagged`` layout.
            grid_size: the grid of token inputs. Default: the layer's (``set_input_size``), else that of the
                model's patch embedding, else a square, if the layer may assume one (``assumes_square``).
            token_mask: ``(B, N)``, or ``(B, *grid)`` for a feature map; bool, True = a real token. The
                others are ignored and get zeros.
            attn_mask: timm's argument; a mask that is the same for every query, boolean or additive (of 0 and
                numbers of at most -10,000), is read as ``token_mask``. Any other, ``(N, N)`` or
                ``(B, 1 or H, N, N)``, only for mixers that compare tokens with tokens (MSSA, MHSA): the others
                form no N x N matrix.
            is_causal: let no token attend to later ones; for the same mixers.
            rope: timm's rotary position embeddings; only for layers adapted from such a model.
            coords: ``(B, N', k)``, k = 1, 2 or 3, where the N' tokens after the prefix are, in any unit and
                integer or floating-point dtype, in place of a grid: pooled representatives are then means over
                the occupied cells of a lattice, see :func:`cbsa_torch.ops.find_cells`. Mixers that need no grid
                need no coordinates. Or a :class:`cbsa_torch.nn.Coordinates`, which all layers of a model share.
                With ``cu_seqlens`` ``(T', k)``.
            cu_seqlens: ``(S + 1,)`` int32 or int64, 0 and where each sequence ends: every one is mixed as
                it would be alone, without padding. Or a :class:`cbsa_torch.nn.Packing`, which all layers of a
                model share.
            grid_sizes: the grid of each sequence.
            parallel: who has the other tokens, if they are spread over processes: ``x`` and ``token_mask`` are
                then those of this rank; grid, prefix tokens and coordinates those of all ranks together. The
                output is exactly that of all tokens together. See :mod:`cbsa_torch.parallel`. Not for MSSA and
                MHSA.

        Returns:
            The update, in the layout of ``x``: use it as ``x + mixer(norm(x))``.

        Raises:
            ValueError: channels, a grid, coordinates, sequences or a mask that do not fit; no grid where one is
                needed; a mask that the mixer has no use for. TypeError: wrong dtypes.
        """
        if cu_seqlens is None and not (isinstance(x, Tensor) and x.is_nested):
            if grid_sizes is not None:
                raise ValueError(
                    "grid_sizes are of packed sequences: pass cu_seqlens, or grid_size for a batch"
                )
            return self._forward(
                self.read(x, grid_size, token_mask, attn_mask, is_causal, rope, coords, parallel=parallel)
            )
        if parallel is not None:
            raise ValueError("parallel must be None for packed sequences: spread one sequence at a time")
        for name, value in {"token_mask": token_mask, "attn_mask": attn_mask, "rope": rope}.items():
            if value is not None:
                raise ValueError(f"{name} must be None for packed sequences, which have no padding")
        if grid_size is not None:
            raise ValueError("pass grid_sizes, one for each sequence, not grid_size, for packed sequences")
        return self._forward_packed(x, cu_seqlens, grid_sizes, coords, is_causal)

    def _forward(self, source: MixerInput) -> Tensor:
        out = self.proj_drop(self._checkpointed(self._update, source))
        if source.token_mask is not None:
            out = out.masked_fill(~source.token_mask[..., None], 0.0)  # the biases, too
        return source.restore(out)

    @not_compiled
    def _forward_packed(
        self,
        x: Tensor,
        cu_seqlens: Tensor | Packing | None,
        grid_sizes: Sequence[GridSize] | None,
        coords: Tensor | Coordinates | None,
        is_causal: bool,
    ) -> Tensor:
        """Compiled code would be made for the lengths of one batch, so this is not compiled."""
        if is_causal and not self.compares_tokens:
            raise ValueError(f"is_causal must be False: {type(self).__name__} summarises all tokens first")
        rows, packing = read_packed(x, self.dim, cu_seqlens, grid_sizes, coords, self.num_prefix_tokens)
        out = self.proj_drop(self._checkpointed(self._update_packed, rows, packing, is_causal))
        return restore_packed(out, x)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of the layer, for whole batches of images.

        Raises:
            TypeError: it cannot compile such a layer, with the reason.
        """
        if self.grid_follower is not None:
            raise not_scriptable(self, "it is told where tokens are by hooks of the model around it")
        if is_orthonormal(self.qkv):
            raise not_scriptable(
                self, "TorchScript has no parametrisations such as orthogonal=True, but fused layers have none"
            )
        if self.grid_size is not None and len(self.grid_size) != 2:
            raise not_scriptable(self, f"its grid must have two axes, got {self.grid_size}")
        if self.proj is None and not is_plain_linear(self.qkv):
            raise not_scriptable(self, "tied=True needs an ordinary linear layer, without adapters or hooks")
        # what a subclass computes otherwise is not in the form of its base
        for kind in itertools.takewhile(lambda kind: "scripted_operator" not in vars(kind), type(self).__mro__):
            if any(callable(value) and name != "__init__" for name, value in vars(kind).items()):
                raise not_scriptable(self, "it has methods of its own and no scripted_operator beside them")
        return ScriptedMixer(self, self.scripted_operator())

    def scripted_operator(self) -> nn.Module:
        """:meth:`mix` for TorchScript: called with queries, keys, values and the grid; ``nn/scripted.py``."""
        raise not_scriptable(self, "it has no scripted_operator")

    def _scripted_representatives(self) -> ScriptedRepresentatives:
        kind: Any = self.representatives
        skips_prefix = self.layout == "standard"
        if isinstance(kind, LearnedRepresentatives):
            return ScriptedRepresentatives(kind.values, 0, (0, 0), skips_prefix)
        if not isinstance(kind, PooledRepresentatives):
            raise not_scriptable(self, "representatives must be 'pool' or 'learned'")
        number = kind.num_representatives
        if isinstance(number, int):
            return ScriptedRepresentatives(None, number, (0, 0), skips_prefix)
        if len(number) != 2:
            raise not_scriptable(self, f"the grid of its cells must have two axes, got {number}")
        return ScriptedRepresentatives(None, 0, (number[0], number[1]), skips_prefix)

    def _checkpointed(self, update: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled() and not is_transformed():
            out: Tensor = checkpoint(update, *args, use_reentrant=False)
            return out
        return update(*args)

    def _update(self, source: MixerInput) -> Tensor:
        """Into the subspaces, mix, and out again: ``(B, N, C)``."""
        return self.mix_and_project(self.project(source))

    def _update_packed(self, rows: Tensor, packing: Packing, is_causal: bool) -> Tensor:
        """The same for a row ``(T, C)`` of sequences."""
        heads = self.project(MixerInput(rows[None], None, None, 0))
        parts = [
            self.mix_and_project(part._replace(source=self.source_of(group, part.source.x, is_causal)))
            for group, part in packing.split(heads)
        ]
        return packing.join(parts) if parts else rows.new_zeros(0, self.dim_out) + rows.sum()

    def project(self, source: MixerInput) -> Heads:
        """Into the subspaces."""
        b, n, _ = source.x.shape
        if self.shared_qkv:
            if self.orthogonal:
                check_no_adapter(self.qkv)
            if self.tied:
                projected, basis = apply_with_matrix(self.qkv, source.x)
            else:
                projected, basis = self.qkv(source.x), None
            shared = projected.view(b, n, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, N, P)
            return Heads(source, shared, shared, shared, basis)
        qkv = self.qkv(source.x).view(b, n, 3, self.num_heads, self.head_dim)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, P) each
        # A norm may return float32 under autocast.
        queries, keys = (norm(t).to(values.dtype) for norm, t in ((self.q_norm, queries), (self.k_norm, keys)))
        return Heads(source, queries, keys, values)

    @abc.abstractmethod
    def mix(self, heads: Heads) -> Tensor:
        """The operator: ``(B, H, N, P)`` tokens to their update. Masked tokens are zeroed by the caller."""

    @abc.abstractmethod
    def count_heads(self, heads: Heads) -> Counts:
        """What :meth:`mix` costs per item, without the projections."""

    def mix_and_project(self, heads: Heads) -> Tensor:
        """:meth:`mix`, and out of the subspaces: ``(B, N, C)``. A mixer may do both at once."""
        return self.project_out(self.mix(heads), heads)

    def project_out(self, mixed: Tensor, heads: Heads) -> Tensor:
        """``(B, H, N, P)`` that :meth:`mix` makes of ``heads``, out of the subspaces: ``(B, N, C)``."""
        joined = self.norm(mixed.transpose(1, 2).flatten(2))  # (B, N, H * P)
        if self.proj is not None:
            return self.proj(joined)
        assert heads.basis is not None, "projections are tied"
        return F.linear(joined, heads.basis.t())

    def heads(self, *args: Any, **kwargs: Any) -> Heads:
        """The tokens in their subspaces, as :meth:`forward` makes them from these arguments."""
        return self.project(self.read(*args, **kwargs))

    def counts(self, *args: Any, **kwargs: Any) -> Counts:
        """What :meth:`forward`, called like this, costs per item between the projections (linear layers)."""
        return self.counts_in(self.heads(*args, **kwargs))

    def counts_in(self, heads: Heads) -> Counts:
        """:meth:`counts` from the tokens in their subspaces, see :meth:`heads`."""
        counts = self.count_heads(heads)
        if self.proj is not None:
            return counts
        return counts + counting.linear(heads.source.x.shape[1], self.num_heads * self.head_dim, self.dim)

    def _make_representatives(
        self, kind: RepresentativeKind | Strategy, number: int | Sequence[int] | None, layout: Layout
    ) -> None:
        """Set :attr:`representatives` and :attr:`layout`, for mixers that have them."""
        check_choice("layout", layout, LAYOUTS)
        if layout == "official" and kind != "pool":
            raise ValueError("layout='official' is a way of pooling; it needs representatives='pool'")
        like = next(self.qkv.parameters())
        self.layout = layout
        self.representatives = make_representatives(
            kind, self.num_heads, number, self.head_dim, device=like.device, dtype=like.dtype
        )

    def _represent(self, heads: Heads) -> Representatives:
        """Representatives of the grid tokens, or of all tokens if the strategy needs no grid."""
        assert self.representatives is not None, "for mixers that made them"
        source, tokens, mask = heads.source, heads.queries, heads.source.token_mask
        place: GridSize | Cells | None = None
        if source.parallel is not None:
            strategy: Any = self.representatives
            where: Any = source.grid_size if self.needs_grid else None
            if self.needs_grid and source.coords is not None:
                where = source.coords.cells(strategy.num_representatives)
            first = self._first_represented(source)
            shared: Representatives = strategy(
                tokens, where, mask, parallel=source.parallel, num_prefix_tokens=first
            )
            return shared
        if self.needs_grid:
            first = self._first_represented(source)
            if source.coords is None:
                assert source.grid_size is not None, "read() sets it when needs_grid"
                place, last = source.grid_size, first + math.prod(source.grid_size)
            else:
                number = self.representatives.num_representatives  # type: ignore[attr-defined]
                place, last = source.coords.cells(number, mask), tokens.shape[2]
            tokens, mask = tokens[:, :, first:last], None if mask is None else mask[:, first:last]
        chosen = self.representatives(tokens, place, mask)
        if not isinstance(chosen, Representatives):
            raise TypeError(
                f"representatives must return ops.Representatives(values, mask, attention), "
                f"got {type(chosen).__name__}"
            )
        return chosen

    def _first_represented(self, source: MixerInput) -> int:
        """The first of the tokens that representatives are made from."""
        return source.num_prefix_tokens if self.needs_grid and self.layout == "standard" else 0

    def extra_repr(self) -> str:
        """Show the options when the module is printed."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"tied={self.tied}, orthogonal={self.orthogonal}"
        )


def _with_options(cls: type[TokenMixer], options: dict[str, Any]) -> type[TokenMixer]:
    return cls.with_options(**options)
