"""Attention maps and receptive fields of some images, measured, and as bytes that the page's script draws."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cbsa_torch._core.text import readable
from cbsa_torch.interpret.attention_maps import cls_attention_maps, receptive_fields
from cbsa_torch.interpret.capture import LayerRecord, capture
from cbsa_torch.interpret.pages.embed import colors, image_url
from cbsa_torch.nn import CBSA, TSSA, AgentAttention, LinearCBSA

MOST_PICTURES = 6
"""How many images get attention maps by default."""

MOST_FIELDS = 16
"""At most so many representatives of a layer have their receptive fields shown."""

FIELD_BUDGET = 300_000
"""Bytes of receptive fields on a page; if there are more, only their mean over heads is shown."""


class Pictures(NamedTuple):
    """Images whose attention maps are shown; :meth:`of` makes them from the model's inputs.

    Examples:
        >>> from cbsa_torch.interpret import Pictures
        >>> Pictures.of(torch.randn(2, 3, 32, 32), ["first", "second"]).images.shape
        (2, 32, 32, 3)
    """

    inputs: Tensor
    """``(B, C, height, width)`` what the model is fed."""
    images: np.ndarray
    """``(B, height, width[, 3])`` the same images in [0, 1], as people see them."""
    titles: Sequence[str]
    """A caption for each."""

    @classmethod
    def of(
        cls,
        inputs: Tensor,
        titles: Sequence[str] | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Pictures:
        """Show what the model is fed.

        Args:
            inputs: ``(B, C, height, width)`` with 1 or 3 channels.
            titles: a caption for each. Default: image 1, image 2, ...
            mean: per channel, what the inputs were normalised by; with ``std``, this is undone. Default: every
                image is scaled from its smallest value to its largest.
            std: per channel; both or neither.

        Raises:
            ValueError: inputs of another shape, one of ``mean`` and ``std`` alone.
        """
        if inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
            raise ValueError(
                f"images must be (B, 1 or 3, height, width) to be shown, got {tuple(inputs.shape)}; "
                "pass pictures= to show something else"
            )
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std must both be given or neither, got mean={mean} and std={std}")
        values = inputs.detach().float().cpu()
        if mean is None or std is None:
            low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
            values = (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
        else:
            values = values * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
        images = values.clamp(0, 1).permute(0, 2, 3, 1).numpy()
        names = [f"image {i + 1}" for i in range(len(inputs))] if titles is None else map(readable, titles)
        return cls(inputs, images[..., 0] if images.shape[-1] == 1 else images, list(names))


class LayerMaps(NamedTuple):
    """One layer's maps."""

    name: str
    """Name of the layer in the model."""
    number: int
    """Counted from 1 among the captured layers."""
    kind: str
    """The layer's class."""
    maps: np.ndarray
    """``(B, 1 + H, rows, columns)``: the mean over heads, then every head."""
    fields: np.ndarray | None
    """``(1 + H, M, rows, columns)`` receptive fields in the first image, None without representatives; M is at
    most :data:`MOST_FIELDS`, evenly spread."""
    representatives: int
    """How many there are; 0 if none."""


class Maps(NamedTuple):
    """Maps of all layers that have a two-dimensional grid."""

    layers: list[LayerMaps]
    missing: dict[str, str]
    """Layer to the reason why it has no map."""
    token: str
    """Whose maps they are: "class token", "first token" or "first patch"."""
    notes: Sequence[str]
    """Sentences about maps that are not the row of an attention matrix."""


@torch.no_grad()
def measure_maps(model: nn.Module, pictures: Pictures) -> Maps:
    """Run the model on ``pictures`` and take the maps of its first token.

    Raises:
        ValueError: pictures that are none, or whose inputs, images and titles differ in number.
    """
    numbers = [len(of) for of in pictures]
    if min(numbers) == 0 or len(set(numbers)) > 1:
        raise ValueError(
            "pictures must have as many inputs as images and titles, and at least one; "
            f"got {numbers[0]} inputs, {numbers[1]} images and {numbers[2]} titles"
        )
    layers, missing, prefixes = [], {}, set()
    notes: dict[str, None] = {}
    with capture(model) as records:
        model(pictures.inputs)
    for number, record in enumerate(records.values(), 1):
        try:
            heads = _maps_of(record)
        except ValueError as error:
            missing[record.name] = str(error)
            continue
        fields, count = _fields(record)
        kind = type(record.layer).__name__
        prefixes.add(record.num_prefix_tokens)
        notes.update(dict.fromkeys(_notes(record.layer)))
        layers.append(LayerMaps(record.name, number, kind, _with_mean(heads, 1), fields, count))
    return Maps(layers, missing, _token(model, prefixes), list(notes))


def _token(model: nn.Module, prefixes: set[int]) -> str:
    if prefixes == {0}:
        return "first patch"
    # Registers are prefix tokens, too; the class token comes before them where there is one.
    named = any(isinstance(getattr(module, "cls_token", None), Tensor) for module in model.modules())
    return "class token" if named and 0 not in prefixes else "first token"


def _notes(layer: nn.Module) -> list[str]:
    """What the layer's map is, if it is neither a row of a softmax nor one of A Aᵀ."""
    if isinstance(layer, TSSA) and layer.form == "tost":
        return [
            "TSSA compares no token with another: its maps show how much each token belongs to a head, which "
            "looks the same from every token."
        ]
    if isinstance(layer, TSSA | LinearCBSA):
        inner = "the diagonal of WᵀW" if isinstance(layer, TSSA) else "WᵀW"
        return [
            f"{type(layer).__name__} forms no attention matrix: its maps are rows of "
            f"W (ε²I + G)⁻¹ Wᵀ with {inner} for G, whose entries may be negative."
        ]
    if isinstance(layer, CBSA) and layer.step == "certified":
        return [
            "Maps of certified steps are rows of BᵀB and receptive fields those of B, all weights of the "
            "tokens in the representatives; entries may be negative."
        ]
    if isinstance(layer, AgentAttention):
        return ["The matrix of AgentAttention is the product of its two softmaxes, through the agents."]
    return []


def _maps_of(record: LayerRecord) -> Tensor:
    """``(B, H, rows, columns)``; raises ``ValueError`` that says why there are none."""
    if record.grid_size is None:
        raise ValueError("its tokens have no grid")
    if len(record.grid_size) != 2:
        raise ValueError(f"its grid has {len(record.grid_size)} axes, and a map needs 2")
    return cls_attention_maps(record)


def _fields(record: LayerRecord) -> tuple[np.ndarray | None, int]:
    try:
        fields = receptive_fields(record)[0]  # (H, M, *grid)
    except ValueError:  # a mixer without representatives
        return None, 0
    count = fields.shape[1]
    return _with_mean(fields[:, evenly_spaced(count, MOST_FIELDS)], 0), count


def _with_mean(values: Tensor, heads: int) -> np.ndarray:
    """Put the mean over the axis ``heads`` before the heads."""
    values = values.detach().float()
    return torch.cat([values.mean(heads, keepdim=True), values], heads).cpu().numpy()


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` indices, evenly spread, first and last included."""
    most = min(most, count)
    return [round(i * (count - 1) / max(most - 1, 1)) for i in range(most)]


def page_data(maps: Maps, pictures: Pictures) -> dict[str, Any]:
    """What the page's script (maps.js) draws: bytes in base64, each map scaled to its own range."""
    size = sum(layer.fields.size for layer in maps.layers if layer.fields is not None)
    heads = slice(None) if size <= FIELD_BUDGET else slice(1)
    return {
        "colors": colors(),
        "images": [
            {"title": title, "source": image_url(image)}
            for title, image in zip(pictures.titles, pictures.images, strict=True)
        ],
        "layers": [
            {
                "name": layer.name,
                "number": layer.number,
                "kind": layer.kind,
                "heads": layer.maps.shape[1] - 1,
                "rows": layer.maps.shape[2],
                "columns": layer.maps.shape[3],
                "maps": _bytes(layer.maps),  # [image][head][row][column]
                "representatives": layer.representatives,
                "fields": None if layer.fields is None else _bytes(layer.fields[heads]),
                "shown": 0 if layer.fields is None else layer.fields.shape[1],
                "fieldHeads": 0 if layer.fields is None else len(layer.fields[heads]) - 1,
            }
            for layer in maps.layers
        ],
    }


def _bytes(values: np.ndarray) -> str:
    low, high = values.min((-2, -1), keepdims=True), values.max((-2, -1), keepdims=True)
    scaled = (values - low) / np.where(high > low, high - low, 1)
    return base64.b64encode(np.round(255 * scaled).astype(np.uint8).tobytes()).decode()
