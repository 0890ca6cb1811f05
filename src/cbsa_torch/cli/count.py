"""``cbsa count``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from timm.layers import Mlp
from timm.utils import reparameterize_model
from torch import nn

from cbsa_torch._core.checks import nearest
from cbsa_torch._core.files import write_atomically
from cbsa_torch.cli.options import parse
from cbsa_torch.models import registry
from cbsa_torch.models.checkpoint import refuse_fetching
from cbsa_torch.models.counting import LayerCounts, ModelCounts, count_model
from cbsa_torch.models.token_set_registry import token_set_names
from cbsa_torch.nn import CBSA, ISTA, MHSA, MSSA, TSSA, AgentAttention, LinearCBSA, TokenMixer
from cbsa_torch.train.engine.console import number_table, print_table, say
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.free_form import FreeArgs

CURVE_TOKENS = tuple(2**k for k in range(4, 17))
"""Numbers of tokens that the plot samples."""


@dataclass
class _CountArgs:
    """Count parameters, FLOPs (two per multiply-add) and pairwise similarities of models, for one image.

    FLOPs are those of the layers as published, "fused" those of the model fused for inference, where ISTA is
    one product and not two. Similarities are the distinct inner products that decide who attends to whom.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """timm model names; `cbsa list` shows ours."""
    image_size: tuple[int, ...] = ()
    """Side, or height and width, in pixels. Default: what each model is made for."""
    tokens: int = 10_000
    """Features of a set, for models of sets (token_set_...), which need --args in_dim WIDTH."""
    args: FreeArgs = field(default_factory=dict)
    """Further constructor arguments, e.g. contraction exact."""
    layers: bool = False
    """Also print every layer."""
    output: str | None = None
    """Also write the counts, layers included, to this JSON file."""
    plot: str | None = None
    """Also draw the FLOPs of one layer of each mechanism against the number of tokens (.png or .svg), at the
    width and heads of the first model."""


def run(args: list[str]) -> None:
    """Count parameters, FLOPs and pairwise similarities of models."""
    options = parse(_CountArgs, args, "count")
    if not options.models:
        raise ConfigError("no models given; name some: cbsa count MODEL ...")
    if options.plot is not None and not options.plot.endswith((".png", ".svg")):
        raise ConfigError(f"--plot must end in .png or .svg, got {options.plot}")
    drawn = [] if options.plot is None else [Path(options.plot), Path(options.plot).with_suffix(".json")]
    if options.output is not None and Path(options.output) in drawn:
        raise ConfigError(
            f"--output {options.output} is a file that --plot {options.plot} writes; give another name"
        )
    if drawn:
        try:  # before anything is counted
            from cbsa_torch.bench import plots
            from cbsa_torch.interpret.plots import to_png, to_svg
        except ImportError as error:
            raise ConfigError(f"--plot: {error}") from None
    table = number_table("model", "input", "parameters", "GFLOPs", "GFLOPs fused", "similarities", left=2)
    rows, remarks = [], []
    for name in options.models:
        counts, fused, size = count_named(name, options.args, options.image_size, options.tokens)
        rows.append({"model": name, "input_size": size, **as_dict(counts), "fused": as_dict(fused)})
        fused_layers = {layer.name: layer for layer in fused.layers}
        for layer in counts.layers if options.layers else ():
            table.add_row(f"  {layer.name}", layer.kind, *_count_cells(layer, fused_layers.get(layer.name)))
        table.add_row(name, "x".join(map(str, size)), *_count_cells(counts.total, fused.total))
        if fused.torch_flops != fused.total.counts.products:
            remarks.append(
                f"{name}: torch's own counter sees {fused.torch_flops / 1e9:.4g} GFLOPs of products, fused"
            )
    print_table(table)
    for remark in remarks:
        say(remark)
    if options.output is not None:
        write_atomically(Path(options.output), json.dumps(rows, indent=2).encode())
        say(f"counts: {options.output}")
    if drawn:
        picture, numbers = drawn
        sizes = mixer_sizes(options.models[0], options.args)
        curves = flops_curves(**sizes)
        figure = plots.flops_against_tokens(CURVE_TOKENS, curves, sizes)
        data = to_png(figure) if picture.suffix == ".png" else to_svg(figure).encode()
        write_atomically(picture, data)
        record = {**sizes, "tokens": CURVE_TOKENS, "flops": curves}
        write_atomically(numbers, json.dumps(record, indent=2).encode())
        say(f"plot: {picture}, numbers: {numbers}")


def _count_cells(layer: LayerCounts, fused: LayerCounts | None) -> tuple[str, str, str, str]:
    published, computed = (
        "" if counted is None else f"{counted.counts.flops / 1e9:.4g}" for counted in (layer, fused)
    )
    return f"{layer.parameters:,}", published, computed, f"{layer.counts.similarities:,}"


def count_named(
    name: str, args: Mapping[str, Any], image_size: Sequence[int], tokens: int
) -> tuple[ModelCounts, ModelCounts, list[int]]:
    """Build a model of timm without storage, and count it at an image size (none: the one it is made for).

    A model of sets of features is counted at a number of ``tokens``, and built with storage: where its tokens
    are pooled depends on the values of their coordinates.

    Returns:
        The counts as published and those of the model fused for inference, and the input size.
    """
    if not timm.is_model(name):
        suggestion = nearest(name, registry.names()) or nearest(name, timm.list_models())
        raise ConfigError(f"no model {name!r} in timm{suggestion}")
    if len(image_size) > 2 or any(side < 1 for side in image_size):
        raise ConfigError(f"--image-size must be one or two positive numbers, got {tuple(image_size)}")
    if tokens < 1:
        raise ConfigError(f"--tokens must be at least 1, got {tokens}")
    asked = (image_size[0], image_size[-1]) if image_size else None
    try:
        if name.split(".", maxsplit=1)[0] in token_set_names():
            if asked is not None:
                raise ValueError("--image-size is of images; --tokens says how many features a set has")
            refuse_fetching("--args", args, "counting needs no weights")
            model = timm.create_model(name, **args)
            fed = (tokens, model.in_dim)
            return count_model(model, fed), count_model(reparameterize_model(model), fed), list(fed)
        model = _build(name, args, asked)
        channels, *made_for = model.default_cfg["input_size"]
        height, width = asked or made_for
        size = (getattr(model, "in_chans", channels), height, width)
        with torch.device("meta"):
            return count_model(model, size), count_model(reparameterize_model(model), size), list(size)
    except Exception as error:  # constructors of any model of timm, called with anything
        raise ConfigError(f"cannot count {name}: {error}") from error


def _build(name: str, args: Mapping[str, Any], img_size: tuple[int, int] | None = None) -> Any:
    """A model without storage, for images of a size where its constructor wants to know it."""
    refuse_fetching("--args", args, "counting needs no weights")
    with torch.device("meta"):
        if img_size is None:
            return timm.create_model(name, **args)
        try:
            return timm.create_model(name, **args, img_size=img_size)
        except TypeError as error:
            if "unexpected keyword argument 'img_size'" not in str(error):
                raise
            return timm.create_model(name, **args)  # a convolutional network takes any size


def as_dict(counts: ModelCounts) -> dict[str, Any]:
    """Plain values, for JSON."""

    def row(layer: LayerCounts) -> dict[str, Any]:
        return {
            "name": layer.name,
            "kind": layer.kind,
            "parameters": layer.parameters,
            "flops": layer.counts.flops,
            **layer.counts._asdict(),
        }

    return {
        "total": row(counts.total),
        "torch_flops": counts.torch_flops,
        "layers": [row(layer) for layer in counts.layers],
    }


def mixer_sizes(name: str, args: Mapping[str, Any]) -> dict[str, int]:
    """Width and heads of a model's first token mixer."""
    model: nn.Module = _build(name, args)
    mixer = next((module for module in model.modules() if isinstance(module, TokenMixer)), None)
    if mixer is None:
        raise ConfigError(
            f"--plot takes its width and heads from the first model, and {name} has no mixer of ours; "
            "name one of `cbsa list` first"
        )
    return {"dim": mixer.dim, "num_heads": mixer.num_heads, "head_dim": mixer.head_dim}


MECHANISMS: dict[str, Callable[..., nn.Module]] = {
    "cbsa": CBSA,
    "mssa": MSSA,
    "mhsa": MHSA,
    "linear_cbsa": LinearCBSA,
    "tssa": TSSA,
    "agent": partial(AgentAttention, qkv="shared"),
    "mlp": lambda dim, num_heads, head_dim: Mlp(dim, 4 * dim),
    "ista": lambda dim, num_heads, head_dim: ISTA(dim),
}
"""Layers that the plot compares, projections included: mixers, and the two kinds of feed-forward."""


def flops_curves(dim: int, num_heads: int, head_dim: int) -> dict[str, list[int]]:
    """FLOPs of one layer of each mechanism at every number of :data:`CURVE_TOKENS`."""
    curves: dict[str, list[int]] = {}
    with torch.device("meta"):
        for name, build in MECHANISMS.items():
            layer = build(dim, num_heads, head_dim=head_dim)
            # Mixers take a map, channels first; feed-forwards read the last axis.
            mixes = isinstance(layer, TokenMixer)
            sizes = [(dim, 1, n) if mixes else (1, n, dim) for n in CURVE_TOKENS]
            curves[name] = [count_model(layer, size).total.counts.flops for size in sizes]
    return curves
