"""Users' strings as text."""

import os

import pytest

from cbsa_torch._core.text import readable


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain [b] :cat: $x$ <b>", "plain [b] :cat: $x$ <b>"),
        ("Käse 猫 🐈\u200d⬛", "Käse 猫 🐈\u200d⬛"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        (os.fsdecode(b"\xff\xfe.png"), r"\xff\xfe.png"),
        ("\ud800", r"\ud800"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("two\nlines", r"two\nlines"),
        ("gnp.\u202eexe", r"gnp.\u202eexe"),
        ("a\u2028b\u200fc", r"a\u2028b\u200fc"),
        (3, "3"),
    ],
)
def test_every_string_becomes_text_that_utf_8_takes(value, shown):
    assert readable(value) == shown
    assert readable(value).encode().decode() == shown


def test_lines_may_stay():
    assert readable("a\n\tb\r", lines=True) == "a\n\tb\\r"


def test_names_that_differ_are_shown_differently():
    assert len({readable(os.fsdecode(b"caf" + bytes([byte]))) for byte in range(0x80, 0x100)}) == 0x80
