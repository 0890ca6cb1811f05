"""Every option says what it is."""

import ast
import re
from pathlib import Path

import pytest

import cbsa_torch
from cbsa_torch.cli import main

SOURCE = Path(cbsa_torch.__file__).parent
FILES = [
    *sorted((SOURCE / "cli").glob("*.py")),
    SOURCE / "train/config.py",
    SOURCE / "train/tasks/segmentation/config.py",
]


def undocumented(path):
    """Fields of dataclasses that no text follows."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (
            isinstance(node, ast.ClassDef) and "dataclass" in "".join(map(ast.unparse, node.decorator_list))
        ):
            continue
        for item, after in zip(node.body, [*node.body[1:], None], strict=True):
            text = isinstance(after, ast.Expr) and isinstance(getattr(after.value, "value", None), str)
            section = ast.unparse(item).endswith("Config)") if isinstance(item, ast.AnnAssign) else False
            if isinstance(item, ast.AnnAssign) and not text and not section:
                yield f"{node.name}.{ast.unparse(item.target)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_option_has_a_text(path):
    assert list(undocumented(path)) == []


def test_train_help_shows_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    plain = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for part in ("--seed", "--optim.weight-decay", "Seed of all random numbers", "Strength of weight decay"):
        assert part in plain
    assert "Use the CPU although there is a GPU." in plain
