"""What is printed of users' strings: themselves."""

import io
import os
import sys

import pytest

from cbsa_torch.train.engine.console import PlainConsole, Reporter, number_table, print_table, say

NAMES = [
    "photo [final].png",
    "[/object]",
    "[bold]x[/bold]",
    ":cat:",
    "[link=http://x]y",
    os.fsdecode(b"caf\xe9"),
]
SHOWN = [*NAMES[:-1], r"caf\xe9"]


@pytest.mark.parametrize(("name", "shown"), [*zip(NAMES, SHOWN, strict=True)])
def test_names_are_no_markup(name, shown, capsys):
    table = number_table(name, "value", left=1)
    table.add_row(name, "1")
    print_table(table)
    Reporter().say(name)
    say(name)
    assert [line.split("  ")[0].rstrip() for line in capsys.readouterr().out.splitlines()] == [shown] * 4


@pytest.mark.parametrize(("name", "shown"), [*zip(NAMES, SHOWN, strict=True)])
def test_a_bar_is_named_as_it_is(name, shown):
    reporter = Reporter()
    reporter.console = PlainConsole(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    with reporter.bar(name, [1, 2], 2) as batches:
        assert list(batches) == [1, 2]
    assert shown in reporter.console.file.getvalue()


def test_names_in_a_file_of_output_are_whole(capsys):
    table = number_table("image", left=1)
    table.add_row("long " * 60 + "end")
    print_table(table)
    assert "long " * 60 + "end" in capsys.readouterr().out


def test_a_terminal_without_the_letters_gets_escapes(monkeypatch):
    from cbsa_torch.cli import main

    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["eval", "--checkpoint", os.fsdecode(b"caf\xe9 \xc3\xa4")]) == 1
    sys.stderr.flush()
    assert rb"caf\xe9 \xe4" in sys.stderr.buffer.getvalue()
