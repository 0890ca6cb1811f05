"""What a run reads must not lie where it writes."""

from __future__ import annotations

from pathlib import Path

from cbsa_torch.models.hub import PREFIX
from cbsa_torch.train.config.base import RunConfig
from cbsa_torch.train.errors import RunFolderError


def check_sources(config: RunConfig, output: Path) -> None:
    """Refuse weights to start from that lie in the run's own folder, and data in one that is replaced.

    Raises:
        RunFolderError: with the key, the path and what to do.
    """
    given = {
        f"model.{key}": getattr(config.model, key, None) for key in ("init_from", "encoder_from", "original")
    }
    given["distill.teacher"] = getattr(getattr(config, "distill", None), "teacher", None)
    for key, source in given.items():
        if not source or source.startswith(PREFIX) or not _lies_in(Path(source), output):
            continue
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
