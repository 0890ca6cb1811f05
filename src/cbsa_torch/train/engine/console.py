"""What runs and commands print: progress bars on a terminal, plain lines elsewhere, tables.

Names of files and classes are users' strings: all here prints strings as they are (``a [final].png`` is no
markup, ``:cat:`` no emoji) and control characters as escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from cbsa_torch._core.text import readable

T = TypeVar("T")
WIDEST = 10_000
"""Characters of a line of a table that goes to a file."""


class PlainConsole(Console):
    """A console whose strings, those in tables included, are no markup."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The one place where strings become what is printed."""
        return super().render_str(readable(text, lines=True), **{**options, "markup": False, "emoji": False})


def say(text: object) -> None:
    """Print a line."""
    print(readable(text, lines=True), flush=True)


def number_table(*headings: str, left: int) -> Table:
    """A table without lines, whose columns after the first ``left`` hold numbers, aligned to the right."""
    table = Table(box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right", overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Print a table: on a terminal long names are folded, elsewhere lines are as long as need be."""
    console = PlainConsole(highlight=False)
    if not console.is_terminal:
        console.width = WIDEST
    console.print(table)


class Reporter:
    """Where a run says how it goes; silent on all processes but the first."""

    def __init__(self, enabled: bool = True) -> None:
        self.console = PlainConsole(quiet=not enabled, soft_wrap=True, highlight=False)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text)

    @contextmanager
    def bar(self, label: str, batches: Iterable[T], total: int) -> Iterator[Iterable[T]]:
        """Show a bar that vanishes when done; yields the batches, whose use advances it."""
        if not self.console.is_terminal or self.console.quiet:
            yield batches
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield progress.track(batches, total=total, description=readable(label))

    @contextmanager
    def work(self) -> Iterator[Callable[[float, float, str], None] | None]:
        """Show a bar that vanishes when done; yields what advances it, None where nothing is shown.

        That is called with the work done, all work, and what is being done.
        """
        if not self.console.is_terminal or self.console.quiet:
            yield None
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:

            def advance(done: float, total: float, label: str) -> None:
                if not progress.tasks:  # begun where an earlier process ended, so that the time left is right
                    progress.add_task(readable(label), total=total, completed=int(done))
                progress.update(progress.task_ids[0], completed=done, description=readable(label))

            yield advance
