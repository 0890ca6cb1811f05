"""Experiment trackers of Accelerate, by name; none of them can stop a run.

What a tracker shows is a copy: ``metrics.jsonl`` is the record. A tracker that fails, at its start or when it
is written to, is named once and left alone from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from cbsa_torch._core.checks import nearest
from cbsa_torch._core.random import keep_random_states
from cbsa_torch.train.config import RunConfig, flat, to_dict
from cbsa_torch.train.errors import ConfigError

NONE = "none"
"""The name for no tracker."""
PROJECT = "cbsa-torch"
"""What a run belongs to, for trackers that know projects or experiments."""
PACKAGES = {"aim": "'aim<4'"}
"""What pip installs, where it is not the tracker's name (Accelerate does not know aim 4)."""
RUN_NAME_ARGUMENT = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}
"""How a tracker is told the name of a run."""

Say = Callable[[str], None]


def check_tracker(name: str) -> None:
    """Refuse a tracker that cannot be used here; touches nothing.

    Args:
        name: one of Accelerate's trackers, or "none".

    Raises:
        ConfigError: no such tracker, or its package is not installed.
    """
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    if name != NONE and name not in known:
        allowed = ", ".join([*known, NONE])
        raise ConfigError(
            f"engine.tracker must be one of {allowed}, got {name!r}{nearest(name, [*known, NONE])}"
        )
    # A class registered by the user is not one of Accelerate's own, and is there.
    if name in {str(own) for own in LoggerType} and name not in map(str, get_available_trackers()):
        raise ConfigError(
            f"engine.tracker {name!r} needs a package that is not installed here: "
            f"pip install {PACKAGES.get(name, name.replace('_', '-'))}"
        )


def tracker_names(name: str) -> list[str] | None:
    """What ``Accelerator(log_with=...)`` takes; None for "none", as it warns of an empty list."""
    return None if name == NONE else [name]


def start_trackers(accelerator: Accelerator, config: RunConfig, say: Say = print) -> None:
    """Begin a run in every tracker of ``accelerator``, with the flat configuration as its hyperparameters.

    TensorBoard's events go to ``tensorboard/`` in the run's folder. A tracker that cannot start (no network, no
    login) is reported and left out: a run that was requeued at night must not end for it.
    """
    names = [item.name if isinstance(item, GeneralTracker) else str(item) for item in accelerator.log_with]
    run_name = Path(config.output).resolve().name
    with _going_on(accelerator.trackers, f"{', '.join(names)} could not start", say):
        accelerator.init_trackers(
            # TensorBoard's project is a folder
            "tensorboard" if names == ["tensorboard"] else PROJECT,
            config=hyperparameters(config),
            init_kwargs={name: {argument: run_name} for name, argument in RUN_NAME_ARGUMENT.items()},
        )


def hyperparameters(config: RunConfig) -> dict[str, bool | int | float | str]:
    """The configuration as ``{"optim.lr": 0.001, ...}``, in types that every tracker takes.

    Lists become text, and None becomes "none", which MLflow and TensorBoard could not hold otherwise.
    """
    values = flat(to_dict(config)).items()
    plain = (bool, int, float, str)
    return {k: NONE if v is None else v if isinstance(v, plain) else str(v) for k, v in values}


def log(accelerator: Accelerator, values: Mapping[str, Any], step: int, say: Say = print) -> None:
    """Send numbers to every tracker; one that fails is reported by ``say`` and not used again.

    Not used again, because TensorBoard blocks for ever once its writing thread has died, and others retry a
    lost connection for minutes at every call.

    Args:
        accelerator: whose trackers were begun by :func:`start_trackers`.
        values: of one step; what is not a number (None: not measured) is left out.
        step: where they belong on the horizontal axis.
        say: gets one line for each tracker that failed.
    """
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    working = []
    for tracker in accelerator.trackers:
        kept = [tracker]
        with _going_on(kept, f"{tracker.name} failed at step {step} and is not used any more", say):
            tracker.log(numbers, step=step)
        working += kept
    accelerator.trackers[:] = working


def finish_trackers(accelerator: Accelerator, say: Say = print) -> None:
    """End the run in every tracker that still works."""
    for tracker in accelerator.trackers:
        with _going_on([], f"{tracker.name} could not finish; what it shows may not be all", say):
            tracker.finish()
    accelerator.trackers.clear()


@contextmanager
def _going_on(trackers: list[Any], what: str, say: Say) -> Iterator[None]:
    """Report an error of a tracker, which may be any, and forget the trackers; keep the random states."""
    try:
        with keep_random_states():  # a tracker may draw, e.g. for a run's name
            yield
    except Exception as error:
        trackers.clear()
        say(f"tracker {what} ({type(error).__name__}: {error}); the run goes on, metrics.jsonl has all")
