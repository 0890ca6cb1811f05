"""Count a model: parameters, FLOPs and pairwise similarities of every layer, for any image size."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cbsa_torch._core.checks import check_positive_int
from cbsa_torch._core.linear import is_plain_linear
from cbsa_torch._core.modes import evaluating
from cbsa_torch.models.adapt.find import SOFTMAX, heads_of
from cbsa_torch.models.adapt.hugging_face import is_hugging_face
from cbsa_torch.models.segmentation.decoder import CosineSimilarity
from cbsa_torch.models.token_set import TokenSetTransformer
from cbsa_torch.nn import ISTA, TokenMixer
from cbsa_torch.nn.fused import Fused
from cbsa_torch.nn.ista import FusedISTA
from cbsa_torch.ops import counting
from cbsa_torch.ops.counting import Counts


class LayerCounts(NamedTuple):
    """One part of a model.

    Examples:
        >>> import timm
        >>> from cbsa_torch.models.counting import count_model
        >>> counts = count_model(timm.create_model("cbt_pico_patch1_8"), (1, 8, 8))
        >>> counts.layers[1].name, counts.layers[1].kind
        ('stem', 'ConvStem')
    """

    name: str
    """Name of the part: ``stem``, ``blocks.0.attn``, ... or ``total``."""
    kind: str
    """Its class."""
    parameters: int
    """Shared ones count where they come first."""
    counts: Counts
    """FLOPs and similarities for one image."""


class ModelCounts(NamedTuple):
    """Every part of a model, and all of it.

    Examples:
        >>> import timm
        >>> from cbsa_torch.models.counting import count_model
        >>> counts = count_model(timm.create_model("cbt_pico_patch1_8"), (1, 8, 8))
        >>> counts.layers[0].name, counts.total.counts.products == counts.torch_flops
        ('(model)', True)
    """

    layers: list[LayerCounts]
    total: LayerCounts
    torch_flops: int
    """What ``torch.utils.flop_counter`` sees: it knows no factorisations, but products of any module. Of ISTA
    that is not fused it sees what :func:`cbsa_torch.ops.ista_step` computes for this number of tokens."""


def count_model(model: nn.Module, input_size: tuple[int, ...]) -> ModelCounts:
    """Count what one image, or one set of features, costs, part by part.

    Counted are linear layers, convolutions, ISTA, our token mixers, the softmax attention of timm's and
    transformers' ViTs and the similarities of a segmentation decoder's masks, by the formulas of
    :mod:`cbsa_torch.ops.counting`. Other modules count with their parameters only; whether something is missed
    shows in ``torch_flops``.

    ISTA counts two products, as it is published, and one if the model is fused for inference: give
    ``timm.utils.reparameterize_model(model)`` to count what that computes.

    Args:
        model: any model of images, or a :class:`TokenSetTransformer`. It is run without gradients on a batch of
            one, and left as it was.
        input_size: ``(channels, height, width)``; of sets of features ``(tokens, in_dim)``, which are then
            placed on a lattice.

    Returns:
        One row per part that has costs or parameters of its own: linear layers and convolutions are counted
        with the mixer, feed-forward, stem or block they belong to.

    Raises:
        ValueError: an input size that is not three (of sets two) positive integers, or that the model refuses.

    Examples:
        >>> import timm
        >>> from cbsa_torch.models.counting import count_model
        >>> total = count_model(timm.create_model("cbt_small_patch16_224"), (3, 224, 224)).total
        >>> total.parameters, total.counts.flops
        (6667048, 4026390528)
    """
    takes_sets = isinstance(model, TokenSetTransformer)
    if len(input_size) != (2 if takes_sets else 3):
        axes = "(tokens, in_dim)" if takes_sets else "(channels, height, width)"
        raise ValueError(f"input_size must be {axes}, got {input_size!r}")
    for side in input_size:
        check_positive_int("input_size", side)
    parts = _parts(model)
    found: dict[str, Counts] = dict.fromkeys(parts, Counts())
    busy = False

    def count(part: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal busy
        if not busy:  # counting a mixer calls its input projection once more
            busy = True
            found[part] += _count(module, args, kwargs, output)
            busy = False

    like = next(model.parameters(), torch.empty(0))
    inputs = [torch.zeros(1, *input_size, device=like.device, dtype=like.dtype)]
    if isinstance(model, TokenSetTransformer):
        inputs.append(_lattice(input_size[0], model.coord_dim).to(like.device))
    with _countable(model):
        read = {mixer.qkv for mixer in model.modules() if _is_read(mixer)}
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if _is_counted(module) and module not in read:
                    hook = functools.partial(count, _part_of(name, parts))
                    hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
            model(*inputs)
        # A second pass, since the hooks above compute representatives once more; torch's counter sees the
        # products of softmax attention only where no fused kernel hides them.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs)

    parameters = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        parameters[_part_of(name.rpartition(".")[0], parts)] += parameter.numel()
    for name, module in model.named_modules():
        if isinstance(module, Fused):  # its weights are buffers
            parameters[_part_of(name, parts)] += sum(weight.numel() for weight in module.buffers())
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    layers = [
        LayerCounts(part or "(model)", kinds[part], parameters[part], found[part])
        for part in parts
        if parameters[part] or any(found[part])
    ]
    whole = sum((layer.counts for layer in layers), Counts())
    total = LayerCounts("total", type(model).__name__, sum(layer.parameters for layer in layers), whole)
    return ModelCounts(layers, total, counter.get_total_flops())


def _lattice(tokens: int, axes: int) -> Tensor:
    """``(1, tokens, axes)`` places of tokens that fill a line, a square or a cube row by row."""
    side = 1
    while side**axes < tokens:
        side += 1
    index = torch.arange(tokens)
    return torch.stack([index // side**axis % side for axis in range(axes)], dim=-1)[None]


@contextmanager
def _countable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in which hooks and torch's counter see every product; afterwards everything as it was."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it hides the parts of a layer from hooks and counter
        for parameter in trainable:  # no_grad is not enough for torch's counter, which hooks what requires one
            parameter.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for parameter in trainable:
            parameter.requires_grad_(True)


_PARTS = (TokenMixer, ISTA, FusedISTA, *SOFTMAX, CosineSimilarity)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _parts(model: nn.Module, name: str = "") -> list[str]:
    """Names of the modules that get a row of their own, in order: what holds mixers, and all directly in it."""
    names = [name]
    if not _is_part(model) and (not name or any(map(_is_part, model.modules()))):
        for child_name, child in model.named_children():
            names += _parts(child, f"{name}.{child_name}".lstrip("."))
    return names


def _is_part(module: nn.Module) -> bool:
    return isinstance(module, _PARTS) or is_hugging_face(module)


def _part_of(name: str, parts: list[str]) -> str:
    """The innermost part that holds a module."""
    while name not in parts:
        name = name.rpartition(".")[0]
    return name


def _is_counted(module: nn.Module) -> bool:
    return isinstance(module, (*_CONVOLUTIONS, nn.Linear)) or _is_part(module)


def _is_read(mixer: nn.Module) -> bool:
    """Whether a mixer reads the matrix of its input projection and does not call it (a hook would make it)."""
    return isinstance(mixer, TokenMixer) and mixer.tied and is_plain_linear(mixer.qkv)


def _count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Counts:
    if isinstance(module, TokenMixer):
        heads = module.heads(*args, **kwargs)
        counts, (b, n, _) = module.counts_in(heads), heads.source.x.shape
        if _is_read(module):
            counts += counting.linear(n, module.qkv.in_features, module.qkv.out_features)
        return counts * b
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    if isinstance(module, nn.Linear):
        tokens = x.numel() // x.shape[-1]
        return counting.linear(tokens, module.in_features, module.out_features)
    if isinstance(module, ISTA):
        return counting.ista(x.numel() // x.shape[-1], x.shape[-1])
    if isinstance(module, FusedISTA):
        return counting.ista(x.numel() // x.shape[-1], x.shape[-1], fused=True)
    if isinstance(module, SOFTMAX) or is_hugging_face(module):
        return _count_softmax(module, x)
    if isinstance(module, CosineSimilarity):
        classes: Tensor = args[1]
        return counting.linear(x.shape[0] * x.shape[1], x.shape[2], classes.shape[1])
    weight: Tensor = module.weight  # type: ignore[assignment]
    return counting.linear(output.numel() // weight.shape[0], weight[0].numel(), weight.shape[0])


def _count_softmax(module: Any, x: Tensor) -> Counts:
    """Softmax attention of others: all but the layers that it calls."""
    num_heads, head_dim = heads_of(module)
    inside = counting.softmax_attention(x.shape[1], num_heads=num_heads, head_dim=head_dim)
    counts = inside * x.shape[0]
    if getattr(module, "q_bias", None) is None or module.qkv_bias_separate:
        return counts
    # EVA with biases multiplies with the weight of its layer, but does not call that.
    return counts + counting.linear(x.shape[0] * x.shape[1], module.qkv.in_features, module.qkv.out_features)
