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

from cbsa_torch._core.files import remove_temporary_files, write_atomically
from cbsa_torch._version import __version__
from cbsa_torch.train.checkpoint import Checkpoints
from cbsa_torch.train.config import TrainConfig, dump_yaml, load_config, to_dict
from cbsa_torch.train.errors import RunFolderError

NOT_COMPARED = (
    "output",
    "resume",
    "accept_changes",
    "overwrite",
    "data.download",
    "data.workers",
    "data.max_bad_images",
    "engine.checkpoint_steps",
    "engine.keep_checkpoints",
    "engine.tracker",
)
"""Keys that a continued run may change: they do not change what is computed."""


class RunFolder:
    """``runs/<name>/``: config.yaml, environment.json, metrics.jsonl, checkpoints, report."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.weights = self.path / "model.safetensors"
        """The weights that eval, predict and report use: of the best or of the last epoch."""
        self.card = self.path / "README.md"
        """What those weights are, for people."""
        self.checkpoints = self.path / "checkpoints"
        """The trainer's states: everything needed to go on."""
        self.skipped = self.path / "skipped_images.txt"
        self.tensorboard = self.path / "tensorboard"
        self.report = self.path / "report.html"
        self.figures = self.path / "figures"

    def states(self, keep: int = 1) -> Checkpoints:
        """The trainer's states, of which ``keep`` are kept."""
        return Checkpoints(self.checkpoints, keep)

    def holds_run(self) -> bool:
        """Whether this folder was written by a run (others have a config.yaml, too)."""
        return self.config.exists() and self.environment.exists()

    def _may_be_a_beginning(self, path: Path) -> bool:
        """Whether a file may be what a process left that was killed in :meth:`start`."""
        return path == self.environment or (path.name.startswith(".") and path.suffix == ".tmp")

    def check(self, config: TrainConfig) -> list[str]:
        """Refuse a folder that this configuration may not use; touches nothing.

        Returns:
            What differs from the configuration of the run that the folder holds, if that was accepted.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"output {self.path} is not a folder")
        if config.resume and not self.holds_run():
            raise RunFolderError(f"nothing to resume in {self.path}: it holds no run")
        if not self.holds_run():
            if not self.path.exists() or all(map(self._may_be_a_beginning, self.path.iterdir())):
                return []
            raise RunFolderError(f"output {self.path} holds files that are not a run; choose another folder")
        if config.overwrite:
            return []
        changed = changed_keys(load_config(self.config), config)
        if changed and not config.accept_changes:
            lines = "".join(f"\n  {line}" for line in changed)
            raise RunFolderError(
                f"output {self.path} holds a run of another configuration:{lines}\n"
                "continue it as it is with --resume, with the new configuration with --accept-changes, "
                "replace it with --overwrite, or choose another --output"
            )
        return changed

    def start(self, config: TrainConfig) -> None:
        """Create the folder with a description of the run; that of a run with a state stays until it is loaded.

        A process killed in here leaves a folder that the same command accepts.
        """
        remove_temporary_files(self.path)
        remove_temporary_files(self.checkpoints)
        if config.overwrite and self.holds_run():
            for path in self.path.iterdir():
                if path in (self.config, self.environment):  # until the end they say that this is a run
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        if config.overwrite or not self.states().paths():
            self.describe(config)

    def describe(self, config: TrainConfig) -> None:
        """Write config.yaml and environment.json."""
        # Continuing must not find the order to overwrite.
        plain = dataclasses.replace(config, resume=False, overwrite=False, accept_changes=False)
        write_atomically(self.environment, json.dumps(environment(), indent=2).encode())
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
