"""One run, one folder: what lies where, who may write to it, and what may not lie in it.

Of the three things that may be called a checkpoint, the folder holds two: the *weights file* that is used
(``model.safetensors``), and the *training states* that a run continues from (:mod:`.state`). The third is the
*run folder* itself.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
import torchvision

from cbsa_torch._core.files import remove_temporary_files, write_atomically
from cbsa_torch._version import __version__
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.models.hub import PREFIX
from cbsa_torch.train.config import RunConfig, dump_yaml, flat, settings, to_dict
from cbsa_torch.train.errors import RunFolderError
from cbsa_torch.train.registry import load_config
from cbsa_torch.train.run.lock import FolderLock
from cbsa_torch.train.run.state import TrainingStates, read_state


class RunFolder:
    """``runs/<name>/``: config.yaml, environment.json, metrics.jsonl, weights, training states, report."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.weights = self.path / "model.safetensors"
        """The weights that eval, predict and report use: of the best or of the last epoch."""
        self.card = self.path / "README.md"
        """What those weights are, for people."""
        self.state_folder = self.path / "states"
        """The folder of the training states: everything needed to go on."""
        self.skipped = self.path / "skipped_images.txt"
        self.tensorboard = self.path / "tensorboard"
        self.report = self.path / "report.html"
        self.figures = self.path / "figures"
        self.lock = FolderLock(self.path / ".run.lock")
        """Held by the process that writes."""

    def states(self, keep: int = 1) -> TrainingStates:
        """The training states, of which ``keep`` are kept."""
        return TrainingStates(self.state_folder, keep)

    def holds_run(self) -> bool:
        """Whether this folder was written by a run (others have a config.yaml, too)."""
        return self.config.is_file() and self._holds_work()

    def _holds_work(self) -> bool:
        """Whether something is here that only a run writes, besides its configuration."""
        return (
            any(path.is_file() for path in (self.lock.path, self.environment, self.metrics, self.weights))
            or self.state_folder.is_dir()
        )

    def _may_be_a_beginning(self, path: Path) -> bool:
        """Whether a file may be what a process left that was killed in :meth:`start`."""
        temporary = path.name.startswith(".") and path.suffix == ".tmp"
        return path in (self.environment, self.lock.path) or temporary

    def check(self, config: RunConfig) -> list[str]:
        """Refuse a folder that this configuration may not use; touches nothing.

        Returns:
            What differs from the configuration of the run that the folder holds, if that was accepted.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"output {self.path} is not a folder")
        check_sources(config, self.path)
        files = [] if not self.path.exists() else list(self.path.iterdir())
        if not self.holds_run():
            if files and self._holds_work() and not all(map(self._may_be_a_beginning, files)):
                raise RunFolderError(
                    f"output {self.path} holds files of a run, but no {self.config.name}: put it back, or "
                    "choose another --output"
                )
            if config.resume:
                raise RunFolderError(f"nothing to resume in {self.path}: it holds no run")
            if not all(map(self._may_be_a_beginning, files)):
                raise RunFolderError(
                    f"output {self.path} holds files that are not a run; choose another folder"
                )
            return []
        self._check_kinds()
        if config.overwrite:
            return []
        self._check_states()
        changed = changed_keys(load_config(self.config), config)
        if changed and not config.accept_changes:
            lines = "".join(f"\n  {line}" for line in changed)
            raise RunFolderError(
                f"output {self.path} holds a run of another configuration:{lines}\n"
                "continue it as it is with --resume, with the new configuration with --accept-changes, "
                "replace it with --overwrite, or choose another --output"
            )
        return changed

    def _check_kinds(self) -> None:
        """No folder may lie where a run writes a file, nor the other way round."""
        for path in (self.environment, self.metrics, self.weights, self.card, self.skipped):
            if path.is_dir():
                raise RunFolderError(f"{path} is a folder, where a run writes a file; move it away")
        if self.state_folder.exists() and not self.state_folder.is_dir():
            raise RunFolderError(f"{self.state_folder} is not a folder; move it away")

    def _check_states(self) -> None:
        """Epochs without a state were trained, and their states lost: starting over would replace the rest.

        One epoch may have been killed between its line of metrics and its state.
        """
        epochs = max((row["epoch"] for row in self.read_metrics()), default=0)
        if epochs > 1 and not self.states().paths():
            raise RunFolderError(
                f"output {self.path} holds a run of {epochs} epochs, but no state to go on from in "
                f"{self.state_folder}: put that folder back, start over with --overwrite, or choose another "
                "--output"
            )

    def start(self, config: RunConfig, say: Callable[[str], None] = print) -> None:
        """Lock the folder and describe the run in it; that of a run with a state stays until it is loaded.

        A process killed in here leaves a folder that the same command accepts.

        Raises:
            RunFolderError: another process writes to it, or it changed since :meth:`check`.
        """
        self.lock.take(say)
        self.check(config)  # again: another run may have begun and ended here since
        remove_temporary_files(self.path)
        remove_temporary_files(self.state_folder)
        if config.overwrite and self.holds_run():
            for path in self._written():  # config.yaml stays to the end: it says that this is a run
                path.unlink()
            events = sorted(self.tensorboard.rglob("*"), reverse=True)  # the inner ones first
            for path in (self.state_folder, self.figures, *events, self.tensorboard):
                _remove_if_empty(path)
        if config.overwrite or not self.states().paths():
            self.describe(config)

    def _written(self) -> Iterator[Path]:
        """The files besides the configuration that a run, its evaluations and its report wrote.

        What else lies here is not ours to remove.
        """
        yield from filter(_is_file, (self.metrics, self.weights, self.card, self.skipped, self.report))
        patterns = (
            (self.state_folder, "step_*.state"),
            (self.tensorboard, "**/events.out.tfevents.*"),
            (self.tensorboard, "**/hparams.yml"),
            (self.path, "report.json"),
            (self.figures, "*.svg"),
            (self.figures, "*.png"),
            (self.path, "eval_*.json"),
            (self.path, "eval_*.skipped.txt"),
        )
        for folder, pattern in patterns:
            yield from filter(_is_file, list(folder.glob(pattern)))

    def describe(self, config: RunConfig) -> None:
        """Write config.yaml and environment.json."""
        # Continuing must not find the order to overwrite.
        plain = dataclasses.replace(config, resume=False, overwrite=False, accept_changes=False)
        write_atomically(self.environment, json.dumps(environment(), indent=2).encode())
        write_atomically(self.config, dump_yaml(plain).encode())

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl.

        Args:
            say: called with one line for each broken line, which a full disk or a killed process may leave.
        """
        lines = self.metrics.read_bytes().split(b"\n") if self.metrics.exists() else []
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                row = {}
            if isinstance(row, dict) and isinstance(row.get("epoch"), int):
                rows.append(row)
            elif row is not None and say is not None:
                say(f"{self.metrics}, line {number}, is left aside: it is no JSON with an epoch")
        return rows

    def keep_metrics_until(self, epoch: int, say: Callable[[str], None] | None = None) -> None:
        """Forget metrics of epochs after ``epoch``, which will be trained again, and lines that are none."""
        rows = [row for row in self.read_metrics(say) if row["epoch"] <= epoch]
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def read_environment(self) -> dict[str, Any]:
        """What environment.json says, nothing where it is missing or damaged: it is for readers only."""
        try:
            values = json.loads(self.environment.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}


def _is_file(path: Path) -> bool:
    return path.is_file() or path.is_symlink()


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """The differences of two configurations as ``key: old -> new``."""
    before, after = flat(to_dict(old)), flat(to_dict(new))
    free = {key for key, metadata, _ in settings(new) if not metadata.get("compared", True)}
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key) and key not in free
    ]


def environment() -> dict[str, Any]:
    """Versions, machine and commit: what a reader needs to reproduce the run."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cbsa_torch": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in (torch, torchvision, timm, accelerate)},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of the source tree this package runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe_last_state(folder: RunFolder) -> str:
    """What an interrupted run can continue from, read from its files: memory may be ahead of them or behind."""
    try:
        path, _ = folder.states().newest()
    except CheckpointError as error:
        return str(error)
    if path is None:
        return "there is no training state yet"
    done = read_state(path)["progress"]
    within = f" and {done['batch']} batches" if done["batch"] else ""
    best = f", the best epoch was {done['best_epoch']}" if done["best_epoch"] else ""
    return (
        f"the last training state is that of epoch {done['epoch']}{within}{best}; "
        f"go on with: cbsa train --output {folder.path} --resume"
    )


def check_sources(config: RunConfig, output: Path) -> None:
    """Refuse weights to start from that lie in the run's own folder, and data in one that is replaced.

    Raises:
        RunFolderError: with the key, the path and what to do.
    """
    for key, metadata, source in settings(config):
        is_local = metadata.get("weights") and source and not source.startswith(PREFIX)
        if is_local and _lies_in(Path(source), output):
            raise RunFolderError(
                f"{key} {source} lies in output {output}, where the run writes its own weights; choose "
                "another --output (to continue a run: --resume)"
            )
    root = config.data.root
    if config.overwrite and root and _lies_in(Path(root), output):
        raise RunFolderError(
            f"data.root {root} lies in output {output}, which is to be overwritten; choose another --output"
        )


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or in it, whatever links are on the way."""
    return path.resolve().is_relative_to(folder.resolve())
