import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cbsa_torch import interpret
from cbsa_torch.interpret import AttentionRanks, ReducedRates, Robustness, Sparsity, _style, plots

LAYERS = ["blocks.0.attn", "blocks.1.attn"]
TOKENS, LEARNED, ACROSS = [[0.1, -0.2], [0.3, 0.4]], [[0.5, 0.6], [0.7, -0.8]], [[9.0, 8.0], [7.0, 6.0]]


@pytest.fixture
def reduced():
    return ReducedRates(
        layers=LAYERS,
        tokens=TOKENS,
        tokens_learned=LEARNED,
        representatives=ACROSS,
        step_tokens=[[-1.5, 0.25], [2.0, -0.5]],
        gap=ACROSS,
        correlation=-0.5,
        correlation_learned=math.nan,
        images=3,
        output=[[5.0, 4.0], [3.0, 2.0]],
        correlation_output=1.0,
        tokens_added=[[-1.0, -2.0], [-3.0, 4.0]],
        correlation_added=0.5,
        gap_max=ACROSS,
    )


def drawn(figure):
    """It renders, both ways."""
    assert plots.to_png(figure, dpi=50).startswith(b"\x89PNG")
    assert plots.to_svg(figure).startswith("<svg")
    return figure.axes


def test_reduced_rates_panel_shows_every_head(reduced):
    axes = drawn(plots.reduced_rates_panel(reduced, [1, 2]))
    lines = [line for line in axes[0].lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in lines] == [[8.5, 6.5], [4.5, 2.5]]
    titles = [axis.get_title() for axis in axes[2:]]
    assert titles == [
        "rank correlation 1.00",
        "rank correlation \N{MINUS SIGN}0.50",
        "rank correlation undefined",
    ]
    for axis, values in zip(axes[2:], (reduced.output, TOKENS, LEARNED), strict=True):
        points = np.concatenate([c.get_offsets().data for c in axis.collections])
        assert points.tolist() == np.stack([np.ravel(ACROSS), np.ravel(values)], 1).tolist()


@pytest.mark.parametrize(
    ("plot", "field"),
    [
        (lambda r: plots.step_sizes(r.step_tokens, [1, 2]), "step_tokens"),
        (lambda r: plots.compressing_heads(r, [1, 2]), "tokens_learned"),
    ],
)
def test_heat_maps_are_signed_and_name_their_values(reduced, plot, field):
    axis = drawn(plot(reduced))[0]
    values = np.array(getattr(reduced, field))
    image = axis.images[0]
    assert image.get_array().data.tolist() == values.T.tolist()
    assert image.norm.vmin == -image.norm.vmax == -np.abs(values).max()
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert texts[(0, 0)] == f"{values[0, 0]:.2f}".replace("-", "\N{MINUS SIGN}")
    assert len(texts) == 4


@pytest.mark.parametrize("layers", [1, 7])
def test_coherence_maps_one_square_a_layer(layers):
    maps = {f"blocks.{i}.attn": torch.rand(3, 3).double() for i in range(layers)}
    axes = [
        axis
        for axis in drawn(plots.coherence_maps(maps, range(1, layers + 1)))
        if axis.images and axis.get_visible()
    ]
    squares = [axis.images[0].get_array().data for axis in axes]
    assert len(squares) == layers
    for square, values in zip(squares, maps.values(), strict=True):
        assert np.array_equal(square, values.numpy())


def test_ranks_and_sparsity_per_layer():
    ranks = AttentionRanks(LAYERS, [[4.0, 4.0], [4.0, 2.0]], [[3.0, 1.0], [2.0, 1.0]], 5)
    axis = drawn(plots.ranks_per_layer(ranks, [1, 2]))[0]
    assert [list(line.get_ydata()) for line in axis.lines] == [[4, 3], [2, 1.5]]
    axis = drawn(plots.sparsity_per_layer(Sparsity(LAYERS, [0.25, 0.75], 5), [1, 2]))[0]
    assert [bar.get_height() for bar in axis.patches] == [25, 75]


def test_robustness_curve_draws_means_seeds_and_the_clean_value():
    first = Robustness([1.0, 0.0, 0.1], [[0.1, 0.2], [0.9, 0.9], [0.8, 0.6]], 0.9, LAYERS)
    figure = plots.robustness_curve({"CBT": first, "ViT": first._replace(sigmas=[1.0, 0.01, 0.1])}, "accuracy")
    axis = drawn(figure)[0]
    mean = axis.lines[0]
    assert list(mean.get_xdata()) == [0, 0.1, 1]
    assert list(mean.get_ydata()) == pytest.approx([0.9, 0.7, 0.15])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["CBT", "ViT"]
    assert axis.get_ylabel() == "accuracy"
    alone = drawn(plots.robustness_curve({"": first}, "accuracy"))[0]
    assert alone.get_legend() is None


def test_names_and_numbers_are_shown_as_they_are():
    image = np.zeros((1, 4, 4))
    panel = plots.attention_panel(image, [("layer 1", image)], titles=["from_$5_to_$6.png"])
    assert plots.to_png(panel)  # a formula would not parse
    assert _style.run_label("_run").strip() == "_run"
    assert _style.signed(-0.001) == "0.00"
    assert _style.signed(-0.006) == "\N{MINUS SIGN}0.01"
    assert len(set(_style.run_colors("abcdefghij").values())) == 10
    assert _style.legible("cat \u732b\n$") == "cat \N{WHITE SQUARE}\\n$"
    measured = Robustness([0.1], [[0.5]], 0.5, LAYERS)
    figure = plots.robustness_curve({"$x_{": measured, "_\u732b": measured}, "share of $")
    drawn(figure)  # neither error nor warning
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "$x_{",
        " _\N{WHITE SQUARE}",
    ]


def test_layers_keep_the_numbers_they_are_given(reduced):
    axes = drawn(plots.reduced_rates_panel(reduced, [3, 7]))
    assert list(axes[0].lines[0].get_xdata()) == [3, 7]
    assert list(axes[0].get_xticks()) == [3, 7]
    legend = axes[-1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["3", "7"]
    ticks = drawn(plots.step_sizes(TOKENS, [3, 7]))[0].get_xticklabels()
    assert [text.get_text() for text in ticks] == ["3", "7"]
    assert _style.layer_ticks(range(1, 14)) == [1, 3, 5, 7, 9, 11, 13]


def test_values_that_are_missing_or_not_finite_leave_gaps(reduced):
    assert len(drawn(plots.step_sizes([[0.0], [0.0, 0.0]], [1, 2]))[0].texts) == 3
    drawn(plots.step_sizes([[math.nan, math.inf]], [1]))
    drawn(plots.step_sizes([[math.nan]], [1]))
    rows = [[math.nan, 1.0], [2.0, math.nan]]
    drawn(plots.reduced_rates_panel(reduced._replace(tokens=rows, output=rows), [1, 2]))
    history = [{"epoch": 1, "train_loss": math.inf, "val_loss": None}]
    axes = drawn(plots.learning_curves({"": history}))
    assert np.isnan(axes[0].lines[0].get_ydata()).all()


@pytest.mark.parametrize("kept", [[1], [2], [1, 3]])
def test_an_epoch_without_neighbours_is_a_dot_at_a_whole_number(kept):
    history = [
        {"epoch": e, **dict.fromkeys(("train_loss", "val_loss", "val_top1"), 0.5 if e in kept else math.nan)}
        for e in range(1, max(kept) + 1)
    ]
    figure = plots.learning_curves({"a": history})
    figure.draw_without_rendering()
    for axis in figure.axes:
        assert all(tick == round(tick) for tick in axis.get_xticks())
        for line in axis.lines:
            assert line.get_marker() == "o"
            assert [int(line.get_xdata()[i]) for i in line.get_markevery()] == kept
    whole = plots.learning_curves({"a": [{**history[0], "epoch": e, "val_loss": 0.5} for e in (1, 2)]})
    assert whole.axes[0].lines[1].get_marker() == "None"  # a line shows these


def test_learning_curves_are_of_the_score_that_is_named():
    rows = [{"epoch": e, "train_loss": 2.0, "val_loss": 1.0, "val_miou": 0.1 * e} for e in (1, 2)]
    left, right = drawn(
        plots.learning_curves({"a": rows, "b": rows[:1]}, score="val_miou", score_title="mean IoU")
    )
    assert right.get_ylabel() == "validation mean IoU (%)"
    assert list(right.lines[0].get_ydata()) == [10, 20]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a", "b"]
    low, high = left.get_ylim()
    assert low == 0
    assert 2.05 < high < 2.5  # nearly equal losses keep a distance from the top


def test_overlay_by_hand():
    image = np.full((2, 2), 0.5)
    attention = np.array([[0.0, 1.0], [2.0, 4.0]])
    over = interpret.overlay(image, attention, colormap="gray", alpha=0.25)
    assert over.shape == (2, 2, 3)
    expected = 0.75 * 0.5 + 0.25 * attention / 4
    np.testing.assert_allclose(over, np.repeat(expected[..., None], 3, -1), atol=1 / 255)
    color = np.random.rand(4, 6, 3)
    np.testing.assert_allclose(interpret.overlay(color, attention, alpha=0), color, atol=1e-6)
    assert interpret.overlay(color, np.ones((2, 3)), colormap="gray", alpha=1).max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.ones((2, 2, 4))}, "image must be"),
        ({"image": np.full((2, 2), 255)}, r"in \[0, 1\]"),
        ({"attention_map": np.full((2, 2), np.nan)}, "attention_map"),
        ({"alpha": 2}, "alpha must be in"),
        ({"colormap": "magmma"}, "colormap must be a name"),
    ],
)
def test_overlays_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        interpret.overlay(**{"image": np.ones((2, 2)), "attention_map": np.ones((2, 2)), **changes})


def test_certified_rates_mark_what_is_guaranteed():
    def layer(before, after, guaranteed):
        return SimpleNamespace(
            before=before, after=after, guaranteed=guaranteed, tokens_before=9 * before, tokens_after=8 * before
        )

    rates = torch.tensor([[3.0, 4.0], [5.0, 6.0]])  # images, heads
    layers = [layer(rates, rates - 1, torch.full((2, 2), 0.5)), layer(rates, rates - 2, None)]
    left, right = drawn(plots.certified_rates(layers, [2, 3]))
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert lines == {"before": [[2, 9], [3, 9]], "after": [[2, 7], [3, 5]], "guaranteed: at most": [[2, 8]]}
    assert [line.get_ydata().tolist() for line in right.lines] == [[81, 81], [72, 72]]
