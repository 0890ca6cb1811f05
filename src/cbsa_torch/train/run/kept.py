"""What an interrupted run has left, in words."""

from __future__ import annotations

from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.train.run.checkpoint import load_state
from cbsa_torch.train.run.folder import RunFolder


def what_is_kept(folder: RunFolder) -> str:
    """What an interrupted run has left, as its files tell: memory may be ahead of them or behind."""
    try:
        path, _ = folder.states().newest()
    except CheckpointError as error:
        return str(error)
    if path is None:
        return "there is no checkpoint yet"
    done = load_state(path)["progress"]
    within = f" and {done['batch']} batches" if done["batch"] else ""
    best = f", the best epoch was {done['best_epoch']}" if done["best_epoch"] else ""
    return (
        f"the last checkpoint is that of epoch {done['epoch']}{within}{best}; "
        f"go on with: cbsa train --output {folder.path} --resume"
    )
