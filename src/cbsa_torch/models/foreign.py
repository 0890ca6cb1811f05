"""Plain state dicts of other packages, read into a model of timm: the one place that knows foreign names.

Known are the names of timm (which the DINO and DINOv2 hubs share, but for registers and gated MLPs), of
transformers' ``ViTModel``, ``DeiTModel`` and ``Dinov2Model`` (with registers, too, and inside other models; as
its versions 4 and 5 spell them), and of torchvision's ViTs; each after any prefix, such as ``backbone.``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from cbsa_torch._core.checks import nearest, some_of
from cbsa_torch.models.checkpoint import CheckpointError, build_described, load_strictly, refuse_fetching
from cbsa_torch.models.official import grid_side
from cbsa_torch.models.resize import set_image_size

_LAYER = r"(?:encoder\.)?layers?\.(\d+)\."
_TRANSFORMERS = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.distillation_token": "dist_token",
    r"embeddings\.register_tokens": "register_tokens",
    r"embeddings\.mask_token": "mask_token",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection\.(weight|bias)": r"patch_embed.proj.\1",
    rf"{_LAYER}attention\.(?:attention\.query|q_proj)\.(weight|bias)": r"blocks.\1.attn.qkv.\2#0/3",
    rf"{_LAYER}attention\.(?:attention\.key|k_proj)\.(weight|bias)": r"blocks.\1.attn.qkv.\2#1/3",
    rf"{_LAYER}attention\.(?:attention\.value|v_proj)\.(weight|bias)": r"blocks.\1.attn.qkv.\2#2/3",
    rf"{_LAYER}attention\.(?:output\.dense|o_proj)\.(weight|bias)": r"blocks.\1.attn.proj.\2",
    rf"{_LAYER}(?:layernorm_before|norm1)\.(weight|bias)": r"blocks.\1.norm1.\2",
    rf"{_LAYER}(?:layernorm_after|norm2)\.(weight|bias)": r"blocks.\1.norm2.\2",
    rf"{_LAYER}(?:intermediate\.dense|mlp\.(?:fc1|weights_in))\.(weight|bias)": r"blocks.\1.mlp.fc1.\2",
    rf"{_LAYER}(?:output\.dense|mlp\.(?:fc2|weights_out|down_proj))\.(weight|bias)": r"blocks.\1.mlp.fc2.\2",
    rf"{_LAYER}mlp\.gate_proj\.(weight|bias)": r"blocks.\1.mlp.fc1.\2#0/2",
    rf"{_LAYER}mlp\.up_proj\.(weight|bias)": r"blocks.\1.mlp.fc1.\2#1/2",
    rf"{_LAYER}layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
    r"layernorm\.(weight|bias)": r"norm.\1",
    r"(?:cls_)?classifier\.(weight|bias)": r"head.\1",
    r"distillation_classifier\.(weight|bias)": r"head_dist.\1",
}
_ENCODER_LAYER = r"encoder\.layers\.encoder_layer_(\d+)\."
_TORCHVISION = {
    r"class_token": "cls_token",
    r"conv_proj\.(weight|bias)": r"patch_embed.proj.\1",
    r"encoder\.pos_embedding": "pos_embed",
    rf"{_ENCODER_LAYER}ln_([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
    rf"{_ENCODER_LAYER}self_attention\.in_proj_(weight|bias)": r"blocks.\1.attn.qkv.\2",
    rf"{_ENCODER_LAYER}self_attention\.out_proj\.(weight|bias)": r"blocks.\1.attn.proj.\2",
    rf"{_ENCODER_LAYER}mlp\.(?:0|linear_1)\.(weight|bias)": r"blocks.\1.mlp.fc1.\2",
    rf"{_ENCODER_LAYER}mlp\.(?:3|linear_2)\.(weight|bias)": r"blocks.\1.mlp.fc2.\2",
    r"encoder\.ln\.(weight|bias)": r"norm.\1",
    r"heads\.head\.(weight|bias)": r"head.\1",
}
_GATED = {
    r"blocks\.(\d+)\.mlp\.w12\.(weight|bias)": r"blocks.\1.mlp.fc1.\2",
    r"blocks\.(\d+)\.mlp\.w3\.(weight|bias)": r"blocks.\1.mlp.fc2.\2",
}


class _Vocabulary(NamedTuple):
    package: str
    landmark: str
    """The end of a name that only this package has."""
    table: Mapping[str, str]
    """The end of a name, a regular expression, to the name in timm; ``#i/n``: part i of n that are joined."""


_VOCABULARIES = (
    _Vocabulary("transformers", r"embeddings\.patch_embeddings\.projection\.weight", _TRANSFORMERS),
    _Vocabulary("torchvision", r"encoder\.layers\.encoder_layer_0\.ln_1\.weight", _TORCHVISION),
    _Vocabulary("DINOv2", r"blocks\.0\.mlp\.w12\.weight", _GATED),
)
_BEFORE_HEAD = ("fc_norm", "attn_pool", "pre_logits")
"""Parts of timm's classifiers between encoder and head; without them the head would get something else."""
_NO_PLACE = r"(?:mask_token|pooler|fc|classifier|\w*head\w*|decoder\w*|fc_norm|attn_pool|pre_logits)(?:\..+)?"
"""What encoders have for their own training or task, and other models of the same encoder have not."""


def read_foreign(
    tensors: Mapping[str, Tensor], source: str, name: str, model_args: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model of timm and load a plain state dict into it, strictly but for the head.

    The number of classes and the image size are those of the weights; callers change them afterwards.

    Args:
        tensors: the state dict, without names of wrappers.
        source: of the weights, for messages.
        name: of the model in timm; no state dict says it.
        model_args: its constructor arguments, where they are not the defaults of ``name``.

    Returns:
        The model in eval mode, in float32, and its description as our files have it: ``model``, ``model_args``,
        and ``notes``, sentences that say how it was read and what was left out.

    Raises:
        CheckpointError: no such model, or weights that are not of it; what is missing, unexpected or of another
            shape is named.
    """
    args = dict(model_args or {})
    if not timm.is_model(name):  # others would be fetched
        raise CheckpointError(f"{source}: no model {name!r} in timm{nearest(name, timm.list_models())}")
    refuse_fetching(f"{source}: the arguments of {name}", args, "the weights are here", CheckpointError)
    with torch.device("meta"):
        draft = build_described({"model": name, "model_args": args}, source)
        if _heads(draft) and getattr(draft, "num_classes", None) == 0:  # what head it could have
            draft = build_described({"model": name, "model_args": {**args, "num_classes": 1}}, source)
    package, named = _in_names_of_timm(tensors, source)
    source = f"{source} (names of {package})"
    own, heads = draft.state_dict(), _heads(draft)
    prefix = _find_prefix(named, {key for key in own if not key.startswith(heads)}, source, name)
    if getattr(draft, "no_embed_class", False) and f"{prefix}register_tokens" in named:
        _move_class_position(named, prefix)
    between = tuple(f"{prefix}{part}." for part in _BEFORE_HEAD if not any(key.startswith(part) for key in own))
    fits = not any(key.startswith(between) for key in named)
    head = _read_head(named, prefix, {key: own[key] for key in own if key.startswith(heads)}) if fits else {}
    body = _read_body(named, prefix, own, heads)
    classes = next(iter(head.values())).shape[0] if head else 0
    if heads and hasattr(draft, "num_classes"):
        args["num_classes"] = classes
    asked, trained = args.get("img_size"), _image_size(body, draft, source)
    if trained is not None:
        args["img_size"] = trained
    model = build_described({"model": name, "model_args": args}, source)
    load_strictly(model, body | head, source)
    what = f"with a head for {classes} classes" if head else "without a head"
    notes = [f"{source}: read into {name}, {what}"]
    read = {id(value) for value in (body | head).values()}
    left_out = sorted(key for key, value in named.items() if id(value) not in read)
    if left_out:
        notes.append(f"{source}: left out, as {name} has no place for it: {some_of(left_out)}")
    if trained is not None and asked is not None:
        notes.append(set_image_size(model, asked))
        args["img_size"] = asked
    return model.eval(), {"model": name, "model_args": args, "notes": notes}


def _in_names_of_timm(tensors: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Tensor]]:
    """The package whose names a state dict has, and its tensors by timm's names, prefixes included."""
    package = "timm"
    table: Mapping[str, str] = {}
    for known in _VOCABULARIES:
        if any(re.search(rf"(?:^|\.){known.landmark}$", key) for key in tensors):
            package, table = known.package, known.table
    named: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in tensors.items():
        name, _, place = _renamed(key, table).partition("#")
        if place:
            index, count = map(int, place.split("/"))
            parts.setdefault(name, dict.fromkeys(range(count)))[index] = value  # type: ignore[arg-type]
        elif name in named:
            raise CheckpointError(f"{source} holds {name} twice, once as {key}: keep the one to be used")
        else:
            named[name] = value
    for name, joined in parts.items():
        if any(part is None for part in joined.values()):
            raise CheckpointError(
                f"{source} holds only some of the {len(joined)} parts of {name}: it is not whole, or no ViT, "
                f"DeiT or DINOv2 of {package}"
            )
        named[name] = torch.cat(list(joined.values()))
    return package, named


def _renamed(key: str, table: Mapping[str, str]) -> str:
    for theirs, timms in table.items():
        found = re.fullmatch(rf"((?:.*?\.)??)({theirs})", key)
        if found:
            return found[1] + re.sub(theirs, timms, found[2])
    return key


def _heads(model: nn.Module) -> tuple[str, ...]:
    """How the names of a model's classifiers begin: two of a distilled DeiT."""
    known: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ((known,) if isinstance(known, str) else known))


def _find_prefix(named: Mapping[str, Tensor], body: Collection[str], source: str, model: str) -> str:
    """What stands before the names of the model in the state dict."""
    found: Counter[str] = Counter()
    for key in named:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", key))]
        found.update(key[:start] for start in starts if key[start:] in body)
    if not found:
        raise CheckpointError(
            f"{source} holds nothing of {model}, but {some_of(sorted(named))}; known are the names of timm, "
            "transformers (ViT, DeiT, DINOv2), torchvision (ViT) and the DINO hubs"
        )
    (best, count), *others = found.most_common(2)
    if others and others[0][1] == count == len(body):
        raise CheckpointError(
            f"{source} holds weights of {model} twice, as {best}* and {others[0][0]}*: keep those to be used"
        )
    return best


def _move_class_position(named: dict[str, Tensor], prefix: str) -> None:
    """DINOv2 with registers has a position for the class token, too; timm adds that to the token itself."""
    token, positions = f"{prefix}cls_token", f"{prefix}pos_embed"
    named[f"{prefix}reg_token"] = named.pop(f"{prefix}register_tokens")
    if token in named and positions in named:
        named[token] = named[token] + named[positions][:, :1]
        named[positions] = named[positions][:, 1:]


def _read_head(named: Mapping[str, Tensor], prefix: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The classifier by the model's names, or nothing where the state dict has none that would fit.

    It may lie further out than the encoder: ``model.head`` beside ``model.vit.blocks``.
    """
    outer = [prefix[:end] for end in range(len(prefix), -1, -1) if prefix[:end].endswith(".") or end == 0]
    for start in outer:
        found = {key: named[f"{start}{key}"] for key in own if f"{start}{key}" in named}
        if found.keys() == own.keys() and all(v.shape[1:] == own[k].shape[1:] for k, v in found.items()):
            return found
    return {}


def _read_body(
    named: Mapping[str, Tensor], prefix: str, own: Collection[str], heads: tuple[str, ...]
) -> dict[str, Tensor]:
    """All but the classifier, without the prefix. What the model does not know stays: an error will name it."""
    inside = {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}
    return {
        key: value
        for key, value in inside.items()
        if not key.startswith(heads) and (key in own or not re.fullmatch(_NO_PLACE, key))
    }


def _image_size(body: Mapping[str, Tensor], model: Any, source: str) -> int | tuple[int, int] | None:
    """The square of patches that positions were trained for, in pixels, where it is not that of ``model``."""
    own, given = model.state_dict().get("pos_embed"), body.get("pos_embed")
    if own is None or given is None or given.ndim != own.ndim or given.shape == own.shape or own.ndim != 3:
        return None
    embed: Any = getattr(model, "patch_embed", None)
    grid = model.grid_size if embed is None else embed.grid_size
    patch = (model.stem.patch_size,) * 2 if embed is None else embed.patch_size
    others = own.shape[1] - math.prod(grid)
    try:
        side = grid_side(given.shape[1] - others, source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; of {given.shape[1]}, {others} are for tokens that are no patches: give img_size where "
            "images are not square, and such tokens (class_token, reg_tokens) where the weights have others"
        ) from None
    height, width = side * patch[0], side * patch[1]
    return height if height == width else (height, width)
