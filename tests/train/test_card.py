from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cbsa_torch.models import from_pretrained
from cbsa_torch.train.hub import MOST_ROWS, clean, data_title, model_card
from cbsa_torch.train.tasks.classification import Classification
from tests.helpers.hub import INFO as INFO_OF_THE_HUB

INFO = {
    "model": "crate_cbt_pico_patch1_8",
    "model_args": {"num_classes": 2, "contraction": "exact"},
    "class_names": ["cat", "dog"],
    "input": INFO_OF_THE_HUB["input"],
    "config": {
        "output": "/home/me/run",
        "seed": 3,
        "data": {"name": "folder", "root": "/home/me/flowers", "hflip": 0.25},
        "optim": {"name": "lion", "lr": 0.001, "keep": "best", "clip_grad": None},
        "engine": {"precision": "bf16"},
    },
    "epoch": 7,
    "val_top1": 0.98765432,
    "cbsa_torch": "0.1.0",
}


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text as a reader sees them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level > 3:
            children = token.children or []
            assert {child.type for child in children} <= {"text", "text_special"}, token.content
            found[-1][-1].append("".join(child.content for child in children))
    return found


def test_the_front_matter_is_what_the_hub_reads():
    data = ModelCard(model_card(INFO)).data
    assert data.library_name == "cbsa-torch"
    assert data.pipeline_tag == "image-classification"
    assert "arxiv:2509.16875" in data.tags
    (result,) = data.eval_results
    assert result.metric_value == 0.987654
    assert (result.dataset_name, result.dataset_split) == ("flowers", "validation")


def test_the_text_says_what_was_measured_and_how_to_load():
    text = model_card(INFO)
    assert "**98.77 %**, after epoch 7, the best epoch so far" in text
    assert 'from_pretrained("OWNER/NAME")' in text
    assert "[arXiv 2509.16875](https://arxiv.org/abs/2509.16875)" in text
    assert "MSSA in the first layers" in text  # crate_cbt, not crate
    assert "/home" not in text
    classes, fed, recipe = tables(text)
    assert classes[1:] == [["0", "cat"], ["1", "dog"]]
    assert ["mean", "[0.25]"] in fed
    assert ["optim.lr", "0.001"] in recipe
    assert ["model.args.contraction", "exact"] in recipe
    assert ["data.hflip", "0.25"] in recipe
    assert not any("root" in row[0] or "clip_grad" in row[0] for row in recipe)


def test_the_curve_has_the_first_and_the_last_epoch():
    rows = [{"epoch": e, "train_loss": 1 / e, "val_loss": None, "val_top1": e / 100} for e in range(1, 101)]
    curve = tables(model_card(INFO, rows))[-1][1:]
    assert len(curve) == MOST_ROWS
    assert curve[0] == ["1", "1.0000", "-", "0.0100"]
    assert curve[-1][0] == "100"
    assert len(tables(model_card(INFO, rows[:1]))[-1]) == 2


def test_nothing_is_invented_for_a_bare_checkpoint():
    text = model_card({"model": "resnet10t", "model_args": {}})
    assert "Measured\n" not in text
    assert "Recipe" not in text
    data = ModelCard(text).data
    assert not data.eval_results
    assert not any("arxiv" in tag for tag in data.tags)


def test_many_classes_are_cut():
    text = model_card({**INFO, "class_names": [f"n{i}" for i in range(1000)]})
    assert "There are 1000." in text
    assert "800 more" in text


MARKUP = ["---", "a|b", "`x`", "<script>", "# head", "a\nb: c", "[x](y)", "yes", "é: - {", "@me", "*b*"]


@pytest.mark.parametrize("name", [*MARKUP, "\udcff\x00", ""])
def test_nasty_names(name):
    check_names([name, "dog"], f"/data/{name}")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(st.characters(), max_size=120), min_size=1, max_size=5),
    st.text(st.characters(), max_size=60),
)
def test_names_break_neither_yaml_nor_markdown(names, root):
    check_names(names, root)


def check_names(names: list[str], root: str) -> None:
    config = {**INFO["config"], "data": {"name": "folder", "root": root}}
    text = model_card({**INFO, "class_names": names, "config": config})
    text.encode()
    card = ModelCard(text)
    (result,) = card.data.eval_results
    assert result.dataset_name == data_title(config)
    assert tables(card.text)[0][1:] == [[str(i), clean(name)] for i, name in enumerate(names)]
    assert ["data", data_title(config)] in tables(card.text)[2]


def test_the_card_of_a_run_says_what_the_run_measured(finished):
    _, result = finished
    text = (result.folder / "README.md").read_text()
    assert f"**{100 * result.best_score:.2f} %**, after epoch {result.best_epoch}" in text
    assert ModelCard(text).data.eval_results[0].metric_value == pytest.approx(result.best_score, abs=1e-6)
    assert all(f"| {name} |" in text for name in ("blue", "green", "red"))
    assert str(result.folder.parent) not in text
    assert from_pretrained(result.folder).info["class_names"] == ["blue", "green", "red"]


def test_a_task_with_a_model_of_its_own_says_its_arguments():
    class Other(Classification):
        own_model = "other"

    assert Other.model_summary({"depth": 2, "dim": 8}, str) == "other with depth 2, dim 8"
    assert Other.model_summary({}, str) == "other with its defaults"
