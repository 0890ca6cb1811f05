"""Progress bars on a terminal, plain lines elsewhere; silent on all processes but the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def counted(batches: Iterable[T], advance: Callable[[], None]) -> Iterator[T]:
    """The batches; ``advance`` is called when each is done with."""
    for batch in batches:
        yield batch
        advance()


class Reporter:
    """Where a run says how it goes."""

    def __init__(self, enabled: bool = True) -> None:
        self.console = Console(quiet=not enabled, soft_wrap=True, highlight=False)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a bar that vanishes when done; yields the function that advances it."""
        if not self.console.is_terminal or self.console.quiet:
            yield lambda: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(label, total=total)
            yield lambda: progress.advance(task)
