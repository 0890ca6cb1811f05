"""Publishing trained models: files, model card, upload."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from torch import nn

from cbsa_torch._core.text import readable
from cbsa_torch.models.checkpoint import load_checkpoint, save_checkpoint
from cbsa_torch.models.hub import explained, timm_config, weights_path
from cbsa_torch.models.registry import FAMILIES
from cbsa_torch.models.shipped import WEIGHTS
from cbsa_torch.models.token_set_registry import token_set_names
from cbsa_torch.train.config import TrainConfig, flat
from cbsa_torch.train.registry import TASKS
from cbsa_torch.train.tasks.base import TIMM_LINK

REPO_ID = "OWNER/NAME"
"""Stands for the repository until the model is pushed to one."""
LONGEST_NAME = 80
"""Characters of a user's name that are shown."""
MOST_CLASSES = 200
MOST_ROWS = 12
"""Rows of the curve: the first, the last, and some between."""
PAPER = "2509.16875"
KEPT = {
    "best": ", the best epoch so far on these same images, which makes it a little optimistic",
    "last": ", kept because it is the last, not for its accuracy",
}
"""By ``optim.keep``: how the epoch was chosen."""
TEMPLATE = Path(__file__).with_name("model_card.md.j2")
"""Filled with Markdown that is escaped already."""


def save_for_hub(
    folder: str | Path, model: nn.Module, info: Mapping[str, Any], card: str | None = None
) -> None:
    """Write the three files by which others load a model; settings that tell of this machine are left out.

    They are ``model.safetensors``, which alone is enough to rebuild the model; ``config.json``, by which timm
    builds it; and ``README.md``, the card.

    Args:
        folder: is made if there is none.
        model: the module.
        info: its description, as of :func:`cbsa_torch.models.load_checkpoint`.
        card: text of the card. Default: made from ``info``.

    Examples:
        >>> from pathlib import Path
        >>> from cbsa_torch.models import load_checkpoint
        >>> from cbsa_torch.train import save_for_hub
        >>> model, info = load_checkpoint("runs/photos/model.safetensors")
        >>> save_for_hub("to_upload", model, info)
        >>> sorted(path.name for path in Path("to_upload").iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    folder, info = Path(folder), published(info)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / WEIGHTS, model, info)
    (folder / "config.json").write_text(json.dumps(timm_config(model, info), indent=2) + "\n")
    (folder / "README.md").write_text(model_card(info) if card is None else card, encoding="utf-8")


def push_to_hub(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    commit_message: str = "Upload model by cbsa-torch",
) -> str:
    """Upload the weights that a run keeps, with their description and card; nothing else of its folder.

    Args:
        checkpoint: a run's folder, or a ``.safetensors`` file of this library. A ``README.md`` beside the
            weights is uploaded as the card; without one it is written.
        repo_id: ``"owner/name"``; made if there is no such repository.
        private: whether a new repository is private. Default: the owner's default.
        token: of your account. Default: that of ``hf auth login``.
        branch: what to push to. Default: main.
        commit_message: of the upload.

    Returns:
        The address of the commit.

    Raises:
        HubError: no network, not logged in, no permission, or not a name of a repository.
        FileNotFoundError, CheckpointError: the checkpoint cannot be read.

    Examples:
        >>> from cbsa_torch.train import push_to_hub
        >>> push_to_hub("runs/photos", "me/photos", private=True)
        'https://huggingface.co/me/photos/commit/1'
    """
    path = weights_path(checkpoint)
    model, info = load_checkpoint(path)
    readme = path.with_name("README.md")
    card = readme.read_text(encoding="utf-8") if readme.is_file() else model_card(info)
    with tempfile.TemporaryDirectory() as folder:
        save_for_hub(folder, model, info, card.replace(REPO_ID, repo_id))
        with explained(repo_id):
            api = HfApi(token=token)
            repository = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=commit_message, revision=branch
            )
    return str(commit)


def model_card(info: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()) -> str:
    """Write the card: YAML front matter, then what the model is, how to load it, and what was measured.

    Args:
        info: what the checkpoint says about itself (``model``, ``model_args``, and as far as it is known
            ``class_names``, ``input``, ``config``, ``epoch``, ``val_top1`` or ``val_miou``, ``cbsa_torch``).
        history: rows of ``metrics.jsonl``, for the curve.

    Names that a user gave are shortened, and cannot end the YAML or become Markdown. Paths are not shown.
    """
    config, names, task = info.get("config") or {}, info.get("class_names") or [], _task_class(info)
    score = info.get(task.score)
    more = "" if len(names) <= MOST_CLASSES else f"\n\n{len(names) - MOST_CLASSES} more are in the file itself."
    card = ModelCard.from_template(
        _front_matter(info, task, score),
        template_path=str(TEMPLATE),
        name=_shown(info["model"]),
        what_it_is=_what_it_is(info, task),
        repo_id=REPO_ID,
        class_count=len(names),
        takes_images=task.takes_images,
        unit=task.unit,
        classes=_table([("output", "class"), *enumerate(names[:MOST_CLASSES])]) + more,
        input_table=_input(info.get("input") or {}),
        recipe=_recipe(info) if config else "",
        score_title=f"{task.score_title[0].upper()}{task.score_title[1:]}",
        percent=None if score is None else f"{100 * float(score):.2f}",
        epoch=_shown(info.get("epoch", "unknown")),
        kept=KEPT.get(str((config.get("optim") or {}).get("keep")), ""),
        curve=_curve(history, task) if history else "",
        version=_shown(info.get("cbsa_torch", "")),
    )
    return str(card)


def published(info: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's description without what tells of the machine it was trained on.

    Of its ``config`` only known settings are kept, without those that are marked as local in the dataclasses of
    :mod:`cbsa_torch.train.config` and without absolute paths; read again, these have their defaults.
    """
    config = info.get("config")
    if not isinstance(config, Mapping):
        return {key: value for key, value in info.items() if key != "config"}
    task = config.get("task", TrainConfig.task)
    if task not in TASKS:
        return {**info, "config": {}}
    named = {"task": task} if "task" in config else {}
    return {**info, "config": {**named, **_without_local(config, TASKS[task][0])}}


def _without_local(values: Mapping[str, Any], section: type[Any]) -> dict[str, Any]:
    hints: dict[str, Any] = get_type_hints(section)
    kept: dict[str, Any] = {}
    for setting in dataclasses.fields(section):
        value = values.get(setting.name)
        if setting.name not in values or setting.metadata.get("local") or _is_absolute(value):
            continue
        hint = hints[setting.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if isinstance(value, Mapping):
                kept[setting.name] = _without_local(value, hint)
        elif isinstance(value, Mapping):
            kept[setting.name] = {key: item for key, item in value.items() if not _is_absolute(item)}
        else:
            kept[setting.name] = value
    return kept


def _is_absolute(value: Any) -> bool:
    return isinstance(value, str) and re.match(r"[/~\\]|[A-Za-z]:[/\\]|file:", value) is not None


def clean(value: object) -> str:
    """One line of printable text from any name: file names may hold line breaks and broken Unicode."""
    text = readable(value, lines=True)
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1].rstrip()}…"


def _shown(value: object) -> str:
    """A cleaned value as text that Markdown shows as it is, inside a table as well."""
    text = clean(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~:@$^=])", r"\\\1", text)


def data_title(config: Mapping[str, Any]) -> str:
    """A name for the images: that of the data set, or the last part of the folder they were in."""
    data = config.get("data") or {}
    name = clean(data.get("name") or "")
    if name == "folder" and data.get("root"):
        return clean(re.split(r"[/\\]", str(data["root"]).rstrip("/\\"))[-1]) or name
    return name or "unknown"


def _task_class(info: Mapping[str, Any]) -> type[Any]:
    """The task that the description names; of a model that no run trained, the one that it is for."""
    likely = next(
        (name for name, (_, task) in TASKS.items() if task.own_model == info["model"]), TrainConfig.task
    )
    named = (info.get("config") or {}).get("task")
    return TASKS[named if named in TASKS else likely][1]


def _front_matter(info: Mapping[str, Any], task: type[Any], score: float | None) -> ModelCardData:
    results = None
    if score is not None:
        title = data_title(info.get("config") or {})
        results = [
            EvalResult(
                task_type=task.hub_task,
                dataset_type=re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip("-.") or "images",
                dataset_name=title,
                dataset_split="validation",
                metric_type=task.hub_metric,
                metric_value=round(float(score), 6),
            )
        ]
    return ModelCardData(
        library_name="cbsa-torch",
        pipeline_tag=task.hub_task,
        tags=[task.hub_task, "cbsa", "timm", *(f"arxiv:{number}" for number in _papers(info["model"]))],
        metrics=[task.hub_metric],
        model_name=clean(info["model"]),
        eval_results=results,
    )


def _family(model: str) -> str | None:
    """Which of our families a model is of; longer names first, as one begins another."""
    model = model.removeprefix("token_set_")
    return next((f for f in sorted(FAMILIES, key=len, reverse=True) if model.startswith(f"{f}_")), None)


def _papers(model: str) -> list[str]:
    family = _family(model)
    return [] if family is None else list(dict.fromkeys([FAMILIES[family].paper, PAPER]))


def _what_it_is(info: Mapping[str, Any], task: type[Any]) -> str:
    model, family = info["model"], _family(info["model"])
    what = f"{'An' if task.model_kind[0] in 'aeiou' else 'A'} {task.model_kind}"
    sets = token_set_names()
    if model in sets:
        what = f"{what}: {_shown(sets[model])}"
    elif model == task.own_model:
        what = f"{what}: {task.model_summary(info['model_args'], _shown)}"
    elif family is not None:
        what = f"{what}: {_shown(FAMILIES[family].summary)}"
    else:
        return f"{what}: `{clean(model)}` of {TIMM_LINK}."
    papers = (f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in _papers(model) or [PAPER])
    return (
        f"{what}; implemented in cbsa-torch, the library for CBSA (Contract-and-Broadcast Self-Attention). "
        f"Described in {', '.join(papers)}."
    )


def _table(rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first row is the heading."""
    head, *body = ([_shown(cell) for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def _input(spec: Mapping[str, Any]) -> str:
    if "in_dim" in spec:
        places = "needed" if spec.get("coords") else "not looked at"
        return _table([("", "value"), ("width of the features", spec["in_dim"]), ("coordinates", places)])
    if "input_size" not in spec:
        return ""
    channels, height, width = spec["input_size"]
    size = f"{channels} x {height} x {width} (channels, height, width)"
    known = [(key, spec[key]) for key in ("mean", "std", "interpolation", "crop_pct") if key in spec]
    return _table([("", "value"), ("size", size), *known])


def _recipe(info: Mapping[str, Any]) -> str:
    values = {**published(info)["config"], "task": None, "model": {"args": info["model_args"]}}
    values["data"] = {**(values.get("data") or {}), "name": None}
    known = [(key, value) for key, value in flat(values).items() if value is not None]
    return _table([("setting", "value"), ("data", data_title(info["config"])), *known])


def _curve(history: Sequence[Mapping[str, Any]], task: type[Any]) -> str:
    count = min(MOST_ROWS, len(history))
    chosen = sorted({round(i * (len(history) - 1) / max(count - 1, 1)) for i in range(count)})
    columns = {"epoch": "{}", "train_loss": "{:.4f}", "val_loss": "{:.4f}", task.score: "{:.4f}"}
    rows: list[list[str]] = [["epoch", "training loss", "validation loss", f"validation {task.score_title}"]]
    for i in chosen:
        values = ((history[i].get(key), form) for key, form in columns.items())
        rows.append([form.format(value) if isinstance(value, int | float) else "-" for value, form in values])
    return _table(rows)
