"""Progress bars on a terminal, plain lines elsewhere; silent on all processes but the first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class Reporter:
    """Where a run says how it goes."""

    def __init__(self, enabled: bool = True) -> None:
        self.console = Console(quiet=not enabled, soft_wrap=True, highlight=False)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False)

    @contextmanager
    def bar(self, label: str, batches: Iterable[T], total: int) -> Iterator[Iterable[T]]:
        """Show a bar that vanishes when done; yields the batches, whose use advances it."""
        if not self.console.is_terminal or self.console.quiet:
            yield batches
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield progress.track(batches, total=total, description=label)
