"""The model card of a checkpoint: a README.md as the Hugging Face Hub reads it, from what was recorded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCardData

from cbsa_torch.models.private import without_paths
from cbsa_torch.models.registry import FAMILIES

REPO_ID = "OWNER/NAME"
"""Stands for the repository until the model is pushed to one."""
LONGEST_NAME = 80
"""Characters of a user's name that are shown."""
MOST_CLASSES = 200
MOST_ROWS = 12
"""Rows of the curve: the first, the last, and some between."""
PAPER = "2509.16875"


class Kind(NamedTuple):
    """What a card says of a task."""

    key: str
    """Of the score, in the checkpoint's description and in ``metrics.jsonl``."""
    task: str
    """The Hub's name."""
    metric: str
    title: str
    short: str


KINDS = (
    Kind("val_top1", "image-classification", "accuracy", "Top-1 accuracy", "accuracy"),
    Kind("val_miou", "image-segmentation", "mean_iou", "Mean IoU", "mean IoU"),
)
SEGMENTER_DEFAULTS = {"encoder": "vit_tiny_patch16_224", "mixer": "cbsa"}
"""Of the constructor's arguments that a card tells."""


def kind_of(info: Mapping[str, Any]) -> Kind:
    """A segmenter where the description says so; else a classifier."""
    return KINDS[info.get("model") == "segmenter"]


def model_card(info: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()) -> str:
    """Write the card: YAML front matter, then what the model is, how to load it, and what was measured.

    Args:
        info: what the checkpoint says about itself (``model``, ``model_args``, and as far as it is known
            ``class_names``, ``input``, ``config``, ``epoch``, ``val_top1`` or ``val_miou``, ``cbsa_torch``).
        history: rows of ``metrics.jsonl``, for the curve.

    Names that a user gave are shortened, and cannot end the YAML or become Markdown. Paths are not shown.
    """
    name = clean(info["model"])
    parts = [
        f"# {escape(name)}",
        _what_it_is(name) if kind_of(info).key == "val_top1" else _what_a_segmenter_is(info["model_args"]),
        _how_to_load(),
        _classes(info.get("class_names") or []),
        _input(info.get("input") or {}),
        _recipe(info),
        _accuracy(info),
        _curve(history, kind_of(info)),
        _limitations(info),
        f"Written by cbsa-torch {escape(clean(info.get('cbsa_torch', '')))}.",
    ]
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{_front_matter(info)}---\n\n{body}\n"


def clean(value: object) -> str:
    """One line of printable text from any name: file names may hold line breaks and broken Unicode."""
    text = str(value).encode("utf-8", "replace").decode()
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1].rstrip()}…"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, inside a table as well."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~:@$^=])", r"\\\1", text)


def data_title(config: Mapping[str, Any]) -> str:
    """A name for the images: that of the data set, or the last part of the folder they were in."""
    data = config.get("data") or {}
    name = clean(data.get("name") or "")
    if name == "folder" and data.get("root"):
        return clean(re.split(r"[/\\]", str(data["root"]).rstrip("/\\"))[-1]) or name
    return name or "unknown"


def _front_matter(info: Mapping[str, Any]) -> str:
    results, kind = None, kind_of(info)
    if info.get(kind.key) is not None:
        title = data_title(info.get("config") or {})
        results = [
            EvalResult(
                task_type=kind.task,
                dataset_type=re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip("-.") or "images",
                dataset_name=title,
                dataset_split="validation",
                metric_type=kind.metric,
                metric_value=round(float(info[kind.key]), 6),
            )
        ]
    data = ModelCardData(
        library_name="cbsa-torch",
        pipeline_tag=kind.task,
        tags=[
            kind.task,
            "cbsa",
            "timm",
            *(f"arxiv:{number}" for number in _papers(info["model"])),
        ],
        metrics=[kind.metric],
        model_name=clean(info["model"]),
        eval_results=results,
    )
    return yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True)


def _family(model: str) -> str | None:
    """Which of our families a model is of; longer names first, as one begins another."""
    return next((f for f in sorted(FAMILIES, key=len, reverse=True) if model.startswith(f"{f}_")), None)


def _papers(model: str) -> list[str]:
    family = _family(model)
    return [] if family is None else list(dict.fromkeys([FAMILIES[family].paper, PAPER]))


def _what_a_segmenter_is(args: Mapping[str, Any]) -> str:
    encoder, mixer = (escape(clean(args.get(key, default))) for key, default in SEGMENTER_DEFAULTS.items())
    return (
        f"An image segmenter: encoder {encoder} of "
        "[timm](https://github.com/huggingface/pytorch-image-models), "
        f"and a decoder of masks with {mixer.upper()} layers; implemented in cbsa-torch, the library for CBSA "
        f"(Contract-and-Broadcast Self-Attention). Described in [arXiv {PAPER}](https://arxiv.org/abs/{PAPER})."
    )


def _what_it_is(model: str) -> str:
    family = _family(model)
    if family is None:
        return f"An image classifier: `{model}` of [timm](https://github.com/huggingface/pytorch-image-models)."
    papers = ", ".join(f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in _papers(model))
    return (
        f"An image classifier: {escape(FAMILIES[family].summary)}; implemented in cbsa-torch, the library for "
        f"CBSA (Contract-and-Broadcast Self-Attention). Described in {papers}."
    )


def _how_to_load() -> str:
    return f"""## How to load it

```python
from cbsa_torch.models import from_pretrained  # pip install 'cbsa-torch[models]'

model = from_pretrained("{REPO_ID}")  # or the folder that holds model.safetensors; in eval mode
model.info["class_names"], model.info["input"]
```

The same file with its description, or by timm:

```python
import timm
import cbsa_torch.models  # registers the models with timm

model, info = cbsa_torch.models.load_checkpoint("model.safetensors")
model = timm.create_model("hf-hub:{REPO_ID}", pretrained=True).eval()  # needs config.json, written by cbsa push
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are escaped already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _classes(names: Sequence[object]) -> str:
    if not names:
        return ""
    rows = [[str(i), escape(clean(name))] for i, name in enumerate(names[:MOST_CLASSES])]
    more = "" if len(names) <= MOST_CLASSES else f"\n\n{len(names) - MOST_CLASSES} more are in the file itself."
    return f"## Classes\n\nThere are {len(names)}.\n\n{_table(['output', 'class'], rows)}{more}"


def _input(spec: Mapping[str, Any]) -> str:
    if "input_size" not in spec:
        return ""
    channels, height, width = spec["input_size"]
    rows = [["size", f"{channels} x {height} x {width} (channels, height, width)"]]
    rows += [
        [key, escape(clean(spec[key]))] for key in ("mean", "std", "interpolation", "crop_pct") if key in spec
    ]
    return f"## Input\n\n{_table(['', 'value'], rows)}"


def _recipe(info: Mapping[str, Any]) -> str:
    if not info.get("config"):
        return ""
    rows = [["data", escape(data_title(info["config"]))]]
    config = without_paths(info)["config"]
    rows += [[f"model.args {escape(clean(k))}", escape(clean(v))] for k, v in info["model_args"].items()]
    for part in ("optim", "data", "engine"):
        # where things lie on the machine that trained says nothing about the model
        skipped = {"name", "root", "download", "workers"} if part == "data" else {"tracker", "threads", "cpu"}
        rows += [
            [escape(f"{part}.{key}"), escape(clean(value))]
            for key, value in (config.get(part) or {}).items()
            if key not in skipped and value is not None
        ]
    rows.append(["seed", escape(clean(config.get("seed")))])
    return f"## Recipe\n\n{_table(['setting', 'value'], rows)}"


def _accuracy(info: Mapping[str, Any]) -> str:
    kind = kind_of(info)
    if info.get(kind.key) is None:
        return ""
    keep = ((info.get("config") or {}).get("optim") or {}).get("keep")
    chosen = {
        "best": ", the best epoch so far on these same images, which makes it a little optimistic",
        "last": ", kept because it is the last, not for its accuracy",
    }.get(str(keep), "")
    return (
        f"## Measured\n\n{kind.title} on validation: **{100 * float(info[kind.key]):.2f} %**, after "
        f"epoch {escape(clean(info.get('epoch', 'unknown')))}{chosen}. Other splits: see `cbsa eval`."
    )


def _curve(history: Sequence[Mapping[str, Any]], kind: Kind) -> str:
    if not history:
        return ""
    last = len(history) - 1
    count = min(MOST_ROWS, len(history))
    chosen = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
    columns = {"epoch": "{}", "train_loss": "{:.4f}", "val_loss": "{:.4f}", kind.key: "{:.4f}"}

    def cell(value: Any, form: str) -> str:
        return form.format(value) if isinstance(value, (int, float)) else "-"

    rows = [[cell(history[i].get(key), form) for key, form in columns.items()] for i in chosen]
    head = ["epoch", "training loss", "validation loss", f"validation {kind.short}"]
    return f"## Training curve\n\n{_table(head, rows)}"


def _limitations(info: Mapping[str, Any]) -> str:
    count = len(info.get("class_names") or [])
    always = f" It always answers with one of its {count} classes, whatever it is shown." if count else ""
    return (
        "## Limitations\n\nMeasured on images like those it was trained on, nowhere else; its probabilities "
        f"are not calibrated.{always}"
    )
