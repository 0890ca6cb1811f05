"""Record what every attention layer of a model computes, by hooks that are removed again."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbsa_torch._core.checks import nearest
from cbsa_torch._core.compiler import COMPILED
from cbsa_torch._core.linear import is_offloaded, is_readable
from cbsa_torch._core.modes import uncompiled
from cbsa_torch._core.types import CBSAStages, GridSize, Representatives
from cbsa_torch._core.wrappers import bare_name
from cbsa_torch.nn import CBSA, AgentAttention, TokenMixer
from cbsa_torch.nn.grids import GridFollower, watch_grids
from cbsa_torch.nn.tokens import as_token_mask, is_token_mask, resolve_grid

Locate = Callable[..., tuple[GridSize | None, int]]
"""The grid of a layer's tokens and the number of prefix tokens: :func:`_locate`, knowing the model."""


class LayerRecord(NamedTuple):
    """One layer's evaluation on one batch; tensors are detached.

    Of the learned parameters only the steps are copied: what is computed later from ``layer``, such as TSSA's
    temperature, is as it is then.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import capture
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> with capture(model) as records:
        ...     logits = model(torch.randn(2, 1, 8, 8))
        >>> record = records["blocks.0.attn"]
        >>> record.tokens.shape, record.grid_size, record.num_prefix_tokens
        (torch.Size([2, 4, 65, 24]), (8, 8), 1)
    """

    name: str
    """The layer's name in the model, e.g. ``blocks.3.attn``."""
    layer: nn.Module
    """The mixer itself."""
    tokens: Tensor
    """``(B, H, N, P)`` the layer's input in its subspaces, U_k^T Z; the queries if queries, keys and values
    have projections of their own. Masked tokens are zero."""
    keys: Tensor | None
    """``(B, H, N, P)`` of layers with separate projections, else None."""
    stages: CBSAStages | None
    """Every intermediate of CBSA; None for other mixers."""
    grid_size: GridSize | None
    """The grid of the tokens after the prefix; None where nothing tells it."""
    num_prefix_tokens: int
    token_mask: Tensor | None
    """``(B, N)`` bool, True = a real token; None if all are."""
    agents: Representatives | None = None
    """The agents of agent attention; None for other mixers."""
    attn_mask: Tensor | None = None
    """The mask that differs from query to query, as it was passed (not a copy); None without one."""
    is_causal: bool = False
    """Whether no token attended to later ones."""
    step_tokens: Tensor | None = None
    """``(H,)`` kappa, as learned; None for mixers without."""
    step_representatives: Tensor | None = None
    """``(H,)`` eta, the step of CBSA's extraction (5), as learned; None for other mixers, and for
    representatives that bring their attention."""

    @property
    def token_weights(self) -> Tensor | None:
        """``(B, H, M, N)`` CBSA's weights of tokens in representatives; None of other mixers.

        A^T of Eq. 5; of a certified step, whose tokens get B^T of the contraction, B, with entries of either
        sign.
        """
        if self.stages is None:
            return None
        certified = getattr(self.layer, "step", "free") == "certified"
        return self.stages.broadcast_attention.mT if certified else self.stages.attention


@contextmanager
def capture(model: nn.Module, layers: Sequence[str | int] | None = None) -> Iterator[dict[str, LayerRecord]]:
    """Record the attention layers of ``model`` during forward passes inside the context.

    Every token mixer of cbsa_torch is recorded, and timm's ``Attention``, the layer of its ViTs.

    Args:
        model: any module tree with such layers.
        layers: names of the layers to record, or their indices among all of them in the model's order;
            negative indices count from the last. Default: all. Only these are kept. Names are those that the
            layers have when nothing is compiled.

    Yields:
        A dictionary of layer names to :class:`LayerRecord`, which each forward pass fills in the order of
        evaluation. Records are recomputed eagerly from the layer's input, whatever implementation the layer
        runs; a compiled model runs uncompiled meanwhile. A layer that is called more than once keeps its last
        call.

    Raises:
        ValueError: no such layer name, no layer asked for, or a model without any. IndexError: an index out
            of range. TypeError: ``layers`` is not a sequence of names and indices.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import capture
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> with capture(model, layers=[-1]) as records:
        ...     logits = model(torch.randn(2, 1, 8, 8))
        >>> records["blocks.0.attn"].stages.attention.shape
        torch.Size([2, 4, 16, 65])
    """
    chosen = choose_layers(attention_layers(model), layers)
    modules = dict(named_modules(model))
    records: dict[str, LayerRecord] = {}

    @torch.no_grad()
    def record(
        name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        records.pop(name, None)  # frees the record of the last call before another is made
        locate = functools.partial(_locate, grids.get(layer), _prefix_around(modules, name))
        read: Any = _read_mixer if isinstance(layer, TokenMixer) else _read_timm
        records[name] = read(name, layer, locate, *args, **kwargs)

    with ExitStack() as hooks, uncompiled():
        grids = hooks.enter_context(watch_grids(model, set(chosen.values())))
        for name, layer in chosen.items():
            hook = functools.partial(record, name)
            hooks.enter_context(layer.register_forward_hook(hook, with_kwargs=True))
        yield records


def captured_batches(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[dict[str, LayerRecord]]:
    """Run ``model`` on every batch and yield its records; errors as :func:`check_batches`."""
    for batch in check_batches(batches):
        with torch.no_grad(), capture(model) as records:
            model(batch)
        yield records


def check_batches(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the ``batches`` that are not empty.

    Raises:
        TypeError: a batch is not a tensor. ValueError: there is none, or none with an image.
    """
    count = 0
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise TypeError(f"batches must yield tensors, the model's inputs; got {type(batch).__name__}")
        if len(batch):
            count += 1
            yield batch
    if not count:
        raise ValueError("batches must hold at least one batch with at least one image, got none")


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` as if nothing were compiled, neither the model nor any part of it.

    Every measure names layers by this, so that names can be matched.
    """
    for name, module in model.named_modules():
        if COMPILED not in module._modules:
            yield bare_name(name), module


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of ``model`` that :func:`capture` can record, by name, in the model's order.

    Raises ``ValueError`` if there is none.
    """
    found = {
        name: module
        for name, module in named_modules(model)
        if isinstance(module, TokenMixer) or _is_timm_attention(module)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no CBSA layer, nor any other attention of cbsa_torch or timm"
        )
    return found


def choose_layers(found: dict[str, nn.Module], layers: Sequence[str | int] | None) -> dict[str, nn.Module]:
    """Those of ``found`` that ``layers`` names or numbers, in the order of ``found``; None = all.

    Raises what :func:`capture` raises.
    """
    if layers is None:
        return found
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence of names and indices, got {layers!r}")
    names, chosen = list(found), set()
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, (int, str)):
            raise TypeError(f"layers must be names and indices, got {layer!r} of type {type(layer).__name__}")
        if isinstance(layer, str) and layer not in found:
            raise ValueError(
                f"layers: no attention layer {layer!r}{nearest(layer, names)}; there are {', '.join(names)}"
            )
        if isinstance(layer, int) and not -len(names) <= layer < len(names):
            raise IndexError(
                f"layers: no attention layer {layer}; there are {len(names)}, "
                f"0 to {len(names) - 1}, or -{len(names)} to -1"
            )
        chosen.add(layer if isinstance(layer, str) else names[layer])
    if not chosen:
        raise ValueError("layers must hold at least one name or index, or be None for all layers")
    return {name: module for name, module in found.items() if name in chosen}


def _is_timm_attention(module: nn.Module) -> bool:
    """Whether it computes what timm's ``Attention`` does: a subclass with its own ``forward`` may not."""
    timm = sys.modules.get("timm.layers.attention")  # a model has a timm layer only if timm is loaded
    kind = getattr(timm, "Attention", None)
    return kind is not None and isinstance(module, kind) and type(module).forward is kind.forward


def _prefix_around(modules: Mapping[str, nn.Module], name: str) -> int | None:
    """The number of prefix tokens of the innermost module around a layer that states one."""
    while name:
        name = name.rpartition(".")[0]
        number = getattr(modules.get(name), "num_prefix_tokens", None)
        if isinstance(number, int):
            return number
    return None


def _locate(
    follower: GridFollower | None,
    around: int | None,
    x: Tensor,
    own: int | None = None,
    *,
    square: bool = False,
) -> tuple[GridSize | None, int]:
    """The grid of a layer's tokens, None if nothing tells, and the number of prefix tokens before it.

    Args:
        follower: knows the grid; None outside models with a patch embedding.
        around: the number of prefix tokens that the model states.
        x: ``(B, N, C)`` the tensor that the layer was called with.
        own: the number that the layer states, which goes first.
        square: where there is no patch embedding, take a square if it fits.
    """
    prefix = around if own is None else own
    try:
        if follower is not None or square:
            return resolve_grid(x.shape[1], None if follower is None else follower.grid_of(x), prefix)
    except (ValueError, RuntimeError):  # no grid fits, or nothing tells which of several
        pass
    return None, prefix or 0


def _read_mixer(name: str, layer: TokenMixer, locate: Locate, *args: Any, **kwargs: Any) -> LayerRecord:
    x: Tensor = next(iter(inspect.signature(layer.forward).bind(*args, **kwargs).arguments.values()))
    if is_offloaded(layer) and not x.is_meta:
        raise ValueError(
            f"{name} keeps its weights elsewhere between calls (offloaded): load them to capture it"
        )
    heads = layer.heads(*args, **kwargs)
    source, mask = heads.source, heads.source.token_mask
    grid, prefix = source.grid_size, source.num_prefix_tokens
    if grid is None:
        grid, prefix = locate(x, prefix or None)
    stages = agents = None
    if isinstance(layer, CBSA):
        stages = CBSAStages(*(t if t is None else _own(t, layer) for t in layer.stages_in(heads)))  # type: ignore[arg-type]
    if isinstance(layer, AgentAttention):
        agents = layer.agents(heads)
        agents = agents._replace(values=_own(agents.values, layer), token_weights=None)
    return LayerRecord(
        name=name,
        layer=layer,
        tokens=_own(_zero_masked(heads.queries, mask), layer) if stages is None else stages.tokens,
        keys=None if heads.keys is heads.queries else _own(_zero_masked(heads.keys, mask), layer),
        stages=stages,
        grid_size=grid,
        num_prefix_tokens=prefix,
        token_mask=mask,
        agents=agents,
        attn_mask=None if source.is_causal else source.attn_mask,
        is_causal=source.is_causal,
        step_tokens=_step(layer, "step_tokens"),
        step_representatives=_step(layer, "step_representatives"),
    )


def _read_timm(
    name: str, layer: Any, locate: Locate, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> LayerRecord:
    b, n, _ = x.shape
    qkv = layer.qkv(x).reshape(b, n, 3, layer.num_heads, layer.head_dim)
    queries, keys, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, P) each
    queries, keys = layer.q_norm(queries), layer.k_norm(keys)
    token_mask = None
    if attn_mask is not None and attn_mask.ndim == 4 and is_token_mask(attn_mask, b, n):
        token_mask, attn_mask = as_token_mask(attn_mask, b, n), None
    queries, keys = (_own(_zero_masked(t, token_mask), layer) for t in (queries, keys))
    grid, prefix = locate(x, square=True)
    return LayerRecord(name, layer, queries, keys, None, grid, prefix, token_mask, None, attn_mask, is_causal)


def _step(layer: nn.Module, name: str) -> Tensor | None:
    step = getattr(layer, name, None)
    return step.detach().clone() if isinstance(step, Tensor) else None


def _zero_masked(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return tokens if mask is None else tokens.masked_fill(~mask[:, None, :, None], 0.0)


def _own(tensor: Tensor, layer: nn.Module) -> Tensor:
    """The tensor, copied if it would keep more than itself alive, or change with the layer's parameters."""
    storage = tensor.untyped_storage()
    readable = (t for t in (*layer.parameters(), *layer.buffers()) if is_readable(t))
    held = {t.untyped_storage().data_ptr() for t in readable}
    if storage.data_ptr() in held or storage.nbytes() > tensor.numel() * tensor.element_size():
        return tensor.clone()
    return tensor
