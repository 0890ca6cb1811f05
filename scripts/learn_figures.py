"""Draw the pictures of the pages in docs/learn, with the numbers of their code blocks.

python scripts/learn_figures.py [docs/images]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import load_sample_image
from torch import Tensor

from cbsa_torch import ops
from cbsa_torch.ops import counting

BLUE, ORANGE, GREY, GREEN = "#2563a8", "#c2571a", "#8a8f98", "#3b8f5a"
HEADS = (BLUE, ORANGE, GREEN, "#7a4fa3")
GRID, CELLS = (24, 40), (6, 10)
SHOWN = ((0, 2, 1), (1, 4, 5), (2, 1, 4))
"""Head, row and column of the representatives whose attention is shown."""
M, P, EPS = 60, 16, 4.0
ALPHA = P / (M * EPS**2)
RECORD = Path(__file__).parents[1] / "benchmarks/results/layers.json"


def rate() -> Figure:
    """Page 1: three clouds, and their rates against the precision."""
    torch.manual_seed(0)
    points = torch.randn(500, 3, dtype=torch.float64)
    extents = {"ball": (1, 1, 1), "disc": (1, 1, 0.02), "line": (1, 0.02, 0.02)}
    colors = dict(zip(extents, HEADS, strict=False))
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    precisions = torch.logspace(0.5, -3, 60)
    curves = figure.add_subplot(1, 4, 4)
    for column, (name, extent) in enumerate(extents.items(), 1):
        x = points * torch.tensor(extent)
        x = x / x.square().sum(1).mean().sqrt()
        axis: Any = figure.add_subplot(1, 4, column, projection="3d")
        axis.scatter(*x.T, s=3, color=colors[name], linewidths=0)
        axis.set(xlim=(-2, 2), ylim=(-2, 2), zlim=(-2, 2))
        axis.set_title(f"{name}: {ops.coding_rate(x):.1f} nats at ε = 0.1", fontsize=9, y=1.02)
        axis.set_box_aspect((1, 1, 1), zoom=1.05)
        axis.tick_params(labelbottom=False, labelleft=False)
        rates = [ops.coding_rate(x, eps=eps) for eps in precisions.tolist()]
        curves.plot(precisions, rates, color=colors[name], label=name)
    curves.set(xscale="log", xlabel="precision ε, finer to the right", ylabel="rate (nats)")
    curves.invert_xaxis()
    curves.legend(frameon=False, fontsize=9)
    plain(curves)
    return figure


def compression() -> Figure:
    """Page 1: steps down the gradient of the rate press points onto a line."""
    torch.manual_seed(0)
    torch.randn(500, 3, dtype=torch.float64)  # what the page has drawn before
    x = torch.randn(300, 2, dtype=torch.float64) * torch.tensor([1.0, 0.2])
    alpha = 2 / (300 * 0.3**2)
    figure = Figure(figsize=(9, 2.3), layout="constrained")
    axes = figure.subplots(1, 4)
    panels = dict(zip((0, 20, 60), axes, strict=False))
    rates = []
    for step in range(61):
        rates.append(ops.coding_rate(x, eps=0.3).item())
        if step in panels:
            panels[step].plot(*x.T, ".", color=BLUE, markersize=3)
            panels[step].set(xlim=(-3, 3), ylim=(-1.5, 1.5), aspect="equal", title=f"after {step} steps")
            panels[step].title.set_fontsize(10)
        x = x - 0.05 * x @ torch.linalg.inv(torch.eye(2, dtype=x.dtype) + alpha * x.mT @ x)
    axes[3].plot(rates, color=BLUE)
    axes[3].set(xlabel="step", ylabel="rate (nats)")
    for axis in axes:
        plain(axis)
    return figure


def photograph() -> tuple[Tensor, Tensor]:
    """Pages 2, 3 and 6: the photograph, and its patches in four heads, ``(4, 960, 16)``."""
    photo = torch.tensor(load_sample_image("flower.jpg")[16:400:2, ::2], dtype=torch.float64) / 255
    patches = photo.unfold(0, 8, 8).unfold(1, 8, 8).reshape(24 * 40, 192)
    tokens = 4 * (patches - patches.mean(0))
    bases = torch.linalg.svd(tokens, full_matrices=False).Vh[:64].T.unflatten(1, (16, 4)).movedim(2, 0)
    return photo, tokens @ bases


def pooled(w: Tensor, cells: tuple[int, int] = CELLS) -> Tensor:
    """The initial guesses, ``(4, M, 16)``."""
    return ops.pool_representatives(w[None], GRID, cells).values[0]


def attention(guess: Tensor, w: Tensor) -> Tensor:
    """A of Eq. 5."""
    return torch.softmax(guess @ w.mT / P**0.5, dim=-1)


def exact(x: Tensor) -> Tensor:
    """C of Eq. 7."""
    return torch.linalg.solve(torch.eye(x.shape[-2], dtype=x.dtype) + ALPHA * x @ x.mT, x)


def by_softmax(x: Tensor) -> Tensor:
    """C of Eq. 8."""
    return torch.softmax(x @ x.mT / P**0.5, dim=-1) @ x


def representatives() -> Figure:
    """Page 2: rates of tokens, and of pooled and extracted representatives."""
    _, w = photograph()
    sizes = [(1, 2), (2, 4), (3, 5), (4, 8), (6, 10), (8, 10), (12, 20)]
    numbers = [rows * columns for rows, columns in sizes]
    guesses = [pooled(w, cells) for cells in sizes]
    before = torch.stack([ops.coding_rate(guess, eps=EPS) for guess in guesses])
    after = torch.stack([ops.coding_rate(guess + attention(guess, w) @ w, eps=EPS) for guess in guesses])
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    axes = figure.subplots(1, 4)
    for head, axis in enumerate(axes):
        axis.axhline(ops.coding_rate(w[head], eps=EPS), color="black", linewidth=1, label="all 960 tokens")
        axis.plot(numbers, after[:, head], "o-", color=BLUE, markersize=4, label="extracted")
        axis.plot(numbers, before[:, head], "o-", color=GREY, markersize=4, label="pooled")
        axis.set(xscale="log", title=f"head {head + 1}", xlabel="representatives M")
        axis.title.set_fontsize(10)
        axis.set_ylim(bottom=0)
        plain(axis)
    axes[0].set_ylabel("rate (nats)")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def attention_maps() -> Figure:
    """Page 3: a row of A in three heads; brightness is the root of the weight."""
    photo, w = photograph()
    weights = attention(pooled(w), w).unflatten(2, GRID)
    figure = Figure(figsize=(9, 1.6), layout="constrained")
    axes = figure.subplots(1, 4)
    axes[0].imshow(photo.numpy())
    axes[0].set_title("photograph", fontsize=10)
    for axis, (head, row, column) in zip(axes[1:], SHOWN, strict=True):
        axis.imshow(weights[head, row * CELLS[1] + column].sqrt().numpy(), cmap="magma")
        axis.set_title(f"head {head + 1}", fontsize=10)
        for where, size, offset in ((axis, 4, 0.5), (axes[0], 32, 0.0)):
            corner = (size * column - offset, size * row - offset)
            where.add_patch(Rectangle(corner, size, size, fill=False, color="white", linewidth=1.5))
        label: dict[str, Any] = {"color": "white", "backgroundcolor": "#00000099", "fontsize": 8}
        axes[0].text(32 * column + 2, 32 * row - 9, f"head {head + 1}", **label)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    return figure


def step() -> Figure:
    """Page 3: what one step does to both rates, with both contractions."""
    _, w = photograph()
    guess = pooled(w)
    a = attention(guess, w)
    x = guess + a @ w
    figure = Figure(figsize=(9, 5), layout="constrained")
    rows = figure.subplots(2, 2)
    for row, name, c, longest in (
        (rows[0], "exact (7)", exact(x), 8),
        (rows[1], "softmax (8)", by_softmax(x), 2),
    ):
        kappas = torch.linspace(0, longest, 81, dtype=torch.float64)
        moved = [w - kappa * a.mT @ c for kappa in kappas]
        of_few = torch.stack([ops.coding_rate(guess + a @ after, eps=EPS) for after in moved])
        of_all = torch.stack([ops.coding_rate(after, eps=EPS) for after in moved])
        for axis, rates, whose in ((row[0], of_few, "representatives"), (row[1], of_all, "all tokens")):
            change = rates - rates[0]
            axis.axhline(0, color="black", linewidth=0.8)
            for head, color in enumerate(HEADS):
                axis.plot(kappas, change[:, head], color=color, label=f"head {head + 1}")
            axis.set(
                xlabel="step size κ", ylabel="change of the rate (nats)", title=f"{whose}, contraction {name}"
            )
            axis.title.set_fontsize(10)
            low = change.min().item()
            axis.set_ylim(1.3 * low, -0.8 * low)
            plain(axis)
    rows[0][0].legend(frameon=False, fontsize=8, ncols=2)
    return figure


def updates() -> Figure:
    """Page 4: the update of four attentions, for tokens in the plane."""
    torch.manual_seed(0)
    along = (
        torch.cat([torch.full((30,), -1.5), torch.full((30,), 1.5)]).double() + 0.4 * torch.randn(60).double()
    )
    across = 0.35 * torch.randn(60, dtype=torch.float64)
    turn = torch.tensor(0.6, dtype=torch.float64)
    basis = torch.stack([torch.stack([turn.cos(), turn.sin()]), torch.stack([-turn.sin(), turn.cos()])])
    w = (torch.stack([along, across], dim=1) @ basis)[None, None]
    guess = torch.stack([w[:, :, :30].mean(2), w[:, :, 30:].mean(2)], dim=2)
    found = {
        "softmax attention (9)": ops.mssa(w),
        "linear attention (12)": ops.linear_cbsa(w, eps=3.0),
        "channel attention (13)": ops.channel_attention(w, eps=3.0),
        "CBSA, exact, M = 2": ops.cbsa(w, guess, contraction="exact", eps=0.5),
    }
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axis, (name, update) in zip(figure.subplots(1, 4), found.items(), strict=True):
        axis.plot(*w[0, 0].T, ".", color=GREY, markersize=3)
        longest = update[0, 0].norm(dim=-1).max()
        arrows = -0.8 * update[0, 0] / longest
        style: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006, "color": BLUE}
        axis.quiver(*w[0, 0].T, *arrows.T, **style)
        axis.set(xlim=(-2.9, 2.9), ylim=(-2.4, 2.4), aspect="equal", title=name)
        axis.title.set_fontsize(10)
        plain(axis)
    return figure


def ista() -> Figure:
    """Page 5: sparse coding by many steps."""
    torch.manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(64, 64, dtype=torch.float64), dim=0)
    truth = torch.rand(100, 64, dtype=torch.float64) * (torch.rand(100, 64) < 0.05)
    x = truth @ dictionary.T
    code = torch.relu(x)
    shown = (truth > 0).sum(1).argmax()  # the token of the most atoms
    atoms = truth[shown].nonzero()[:, 0]
    objectives, zeros, kept = [], [], {}
    for iteration in range(201):
        objectives.append((0.5 * (x - code @ dictionary.T).square().sum(-1) + 0.1 * code.sum(-1)).mean().item())
        zeros.append(100 * (code == 0).double().mean().item())
        if iteration in (0, 200):
            kept[iteration] = code[shown]
        code = torch.relu(code + 0.1 * (x - code @ dictionary.T) @ dictionary - 0.01)
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.4])
    left.plot(objectives, color=BLUE)
    left.set(xlabel="step", ylabel="objective")
    middle.plot(zeros, color=BLUE)
    middle.set(xlabel="step", ylabel="entries that are zero (%)", ylim=(0, 100))
    right.vlines(range(64), 0, kept[0], color=GREY, linewidth=1.5, label="step 0")
    right.plot(range(64), kept[200], "o", color=BLUE, markersize=4, label="step 200")
    right.plot(atoms, truth[shown, atoms], "x", color=ORANGE, markersize=6, label="the atoms it was made of")
    right.set(xlabel="entry of one code", ylim=(-0.05, 1.4))
    right.legend(frameon=False, fontsize=8)
    for axis in (left, middle, right):
        plain(axis)
    return figure


def certificate() -> Figure:
    """Page 6: the rate after a step of any length, and the bound of the theorem."""
    _, w = photograph()
    cells = torch.arange(960).view(GRID) // 40 // 4 * 10 + torch.arange(40) // 4
    weights = torch.nn.functional.one_hot(cells.flatten(), M).double().T / 16
    b = weights + attention(weights @ w, w)
    x = b @ w
    back = b.mT @ exact(x)
    norm = torch.linalg.matrix_norm(b @ b.mT, 2)
    parts = torch.linspace(0, 2, 81, dtype=torch.float64)  # of the limit
    kappas = 2 * parts[:, None] / norm
    rates = torch.stack([ops.coding_rate(b @ (w - kappa[:, None, None] * back), eps=EPS) for kappa in kappas])
    bound = rates[0] - ALPHA * kappas * (1 - parts[:, None]) * back.square().sum((1, 2))
    assert (rates <= bound + 1e-12).all()
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    axes = figure.subplots(1, 4)
    for head, axis in enumerate(axes):
        axis.axhline(rates[0, head], color=GREY, linewidth=0.8)
        axis.axvline(2 / norm[head], color=GREY, linewidth=1, linestyle="--")
        axis.plot(kappas[:, head], bound[:, head], color=ORANGE, label="theorem: at most")
        axis.plot(kappas[:, head], rates[:, head], color=BLUE, label="measured")
        spread = (rates[0, head] - rates[:, head].min()).item()
        start = rates[0, head].item()
        axis.set(xlabel="step size κ", title=f"head {head + 1}", ylim=(start - 1.3 * spread, start + spread))
        axis.title.set_fontsize(10)
        plain(axis)
    axes[0].set_ylabel("rate of the representatives")
    shown = axes[0].get_legend_handles_labels()
    figure.legend(*shown, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def time() -> Figure:
    """Page 7: operations and measured time for each token."""
    numbers = [2**power for power in range(7, 21)]
    dim, heads = 384, 6
    around = [2 * counting.linear(n, dim, dim).flops for n in numbers]
    inside = {
        "CBSA": [counting.cbsa(n, min(n, 64), num_heads=heads, head_dim=64).flops for n in numbers],
        "softmax attention": [
            counting.softmax_attention(n, num_heads=heads, head_dim=64).flops for n in numbers
        ],
    }
    record = json.loads(RECORD.read_text())
    measured = {"CBSA": "cbsa tiled", "softmax attention": "mssa"}
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (label, flops), color in zip(inside.items(), (BLUE, ORANGE), strict=True):
        each = [(a + b) / n / 1e6 for a, b, n in zip(flops, around, numbers, strict=True)]
        left.plot(numbers, each, color=color, label=label)
        rows = [row for row in record["rows"] if row["name"] == measured[label] and not row["training"]]
        rows.sort(key=lambda row: row["tokens"])
        microseconds = [1e3 * row["milliseconds"] / (row["batch"] * row["tokens"]) for row in rows]
        right.plot([row["tokens"] for row in rows], microseconds, "o-", color=color, markersize=4, label=label)
    left.set(ylabel="million operations / token")
    right.set(ylabel="µs / token")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="tokens N")
        plain(axis)
    left.legend(frameon=False, fontsize=9)
    return figure


def plain(axis: Axes) -> None:
    """A light grid, and no frame above and to the right."""
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


FIGURES: dict[str, Callable[[], Figure]] = {
    "rate": rate,
    "compression": compression,
    "representatives": representatives,
    "attention": attention_maps,
    "step": step,
    "updates": updates,
    "ista": ista,
    "certificate": certificate,
    "time": time,
}
"""By the end of the file's name, learn_NAME.png."""


def main(folder: str = "docs/images") -> None:
    """Draw all."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw().savefig(f"{folder}/learn_{name}.png", dpi=120)
        print(f"{folder}/learn_{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
