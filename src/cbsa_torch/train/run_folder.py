"""One run, one folder: what lies where, and who may write to it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from cbsa_torch._core.files import write_atomically
from cbsa_torch._version import __version__
from cbsa_torch.train.config import TrainConfig, dump_yaml, load_config, to_dict
from cbsa_torch.train.errors import RunFolderError

NOT_COMPARED = ("output", "resume", "overwrite")
"""Keys that a resumed run may change: they do not change what is computed."""


class RunFolder:
    """``runs/<name>/``: config.yaml, environment.json, metrics.jsonl, checkpoints, report."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.weights = self.path / "model.safetensors"
        """The weights that eval, predict and report use: of the best or of the last epoch."""
        self.last = self.path / "last.pt"
        """Everything needed to go on: weights, average, optimiser, random states."""
        self.skipped = self.path / "skipped_images.txt"
        self.tensorboard = self.path / "tensorboard"
        self.report = self.path / "report.html"
        self.figures = self.path / "figures"

    def holds_run(self) -> bool:
        """Whether this folder was written by a run (others have a config.yaml, too)."""
        return self.config.exists() and self.environment.exists()

    def check(self, config: TrainConfig) -> None:
        """Refuse a folder that this configuration may not use; touches nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"output {self.path} is not a folder")
        if config.resume:
            if not self.holds_run():
                raise RunFolderError(f"nothing to resume in {self.path}: it holds no run")
            changed = changed_keys(load_config(self.config), config)
            if changed:
                raise RunFolderError(
                    f"cannot resume {self.path} with another configuration: {'; '.join(changed)}"
                )
        elif self.path.exists() and any(self.path.iterdir()):
            if not self.holds_run():
                raise RunFolderError(
                    f"output {self.path} holds files that are not a run; choose another folder"
                )
            if not config.overwrite:
                raise RunFolderError(
                    f"output {self.path} holds another run; continue it with --resume, replace it with "
                    "--overwrite, or choose another --output"
                )

    def start(self, config: TrainConfig) -> None:
        """Create the folder (emptied if it is to be overwritten) and describe the run in it."""
        if config.overwrite and self.holds_run():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.environment, json.dumps(environment(), indent=2).encode())
        if not config.resume:
            # Resuming must not find the order to overwrite.
            plain = dataclasses.replace(config, resume=False, overwrite=False)
            write_atomically(self.config, dump_yaml(plain).encode())

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl that are whole."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # a line cut short by a killed process
                continue
        return rows

    def keep_metrics_until(self, epoch: int) -> None:
        """Forget metrics of epochs after ``epoch``, which will be trained again."""
        rows = [row for row in self.read_metrics() if row["epoch"] <= epoch]
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())


def changed_keys(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The differences of two configurations as ``key: old -> new``."""
    before, after = _flatten(to_dict(old)), _flatten(to_dict(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key) and key not in NOT_COMPARED
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def environment() -> dict[str, Any]:
    """Versions, machine and commit: what a reader needs to reproduce the run."""
    import accelerate
    import timm
    import torchvision

    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cbsa_torch": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of the source tree this package runs from, if it is one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
