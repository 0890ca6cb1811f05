"""Run a notebook's code as Jupyter does, without Jupyter, and keep what it shows.

python scripts/run_notebook.py notebooks/1-five-minutes.ipynb folder

Writes every figure as ``CELL-NUMBER.png``, what has a form in HTML as ``CELL.html``. Cells are plain Python,
without magics.
"""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl


class Ran(NamedTuple):
    """What is left of a notebook that ran."""

    names: dict[str, Any]
    """Its variables."""
    figures: dict[str, list[bytes]]
    """The pictures below each cell that drew any, as PNG."""
    html: dict[str, str]
    """What is displayed below cells that end with a value with a form in HTML, such as a movie."""


def code_cells(path: Path) -> list[tuple[str, str]]:
    """Name and source of the cells of code."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(cell["id"], "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]


def run_notebook(path: Path) -> Ran:
    """Run the cells in one scope; after each, its figures are kept and closed, as in Jupyter."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ran = Ran({"__name__": "__main__"}, {}, {})
    with mpl.rc_context():
        for name, source in code_cells(path):
            value = _run_cell(source, f"{path.name}, cell {name}", ran.names)
            if hasattr(value, "_repr_html_"):
                ran.html[name] = value._repr_html_()
            for number in plt.get_fignums():
                picture = io.BytesIO()
                plt.figure(number).savefig(picture, dpi=100)
                ran.figures.setdefault(name, []).append(picture.getvalue())
            plt.close("all")
    return ran


def _run_cell(source: str, title: str, names: dict[str, Any]) -> Any:
    """The value of the last line, if it is an expression."""
    tree = ast.parse(source, title)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, title, "exec"), names)
        return None
    del tree.body[-1]
    exec(compile(tree, title, "exec"), names)
    return eval(compile(ast.Expression(last.value), title, "eval"), names)


def main(notebook: str, folder: str) -> None:
    """Run a notebook and write what it shows into a folder."""
    ran = run_notebook(Path(notebook))
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, pictures in ran.figures.items():
        for number, picture in enumerate(pictures, 1):
            Path(folder, f"{name}-{number}.png").write_bytes(picture)
    for name, text in ran.html.items():
        Path(folder, f"{name}.html").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
