import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import cbsa_torch.models  # noqa: F401
from cbsa_torch import interpret, ops
from tests.helpers.compare import assert_close


@pytest.fixture
def model():
    options = {"embed_dim": 16, "depth": 3, "num_heads": 2, "num_representatives": 9}
    return timm.create_model("cbt_pico_patch1_8", **options).eval()


@pytest.fixture
def images():
    return torch.randn(5, 1, 8, 8)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_capture_records_what_the_layers_compute(model, images):
    with interpret.capture(model) as records:
        expected = model(images)
    assert list(records) == [f"blocks.{i}.attn" for i in range(3)]
    record = records["blocks.1.attn"]
    assert (record.grid_size, record.num_prefix_tokens) == ((8, 8), 1)
    layer = model.blocks[1].attn
    seen = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(output=output))
    assert_close(model(images), expected, 0)
    merged = record.stages.output.transpose(1, 2).flatten(2)
    assert_close(layer.proj(merged), seen["output"], 1e-6)
    assert not record.stages.attention.requires_grad


def test_capture_of_chosen_layers_and_hooks_removed(model, images):
    with interpret.capture(model, ["blocks.2.attn"]) as records:
        model(images)
    assert list(records) == ["blocks.2.attn"]
    assert hooks(model) == 0
    with pytest.raises(KeyboardInterrupt), interpret.capture(model):
        raise KeyboardInterrupt
    assert hooks(model) == 0


def test_capture_names_what_is_not_there(model):
    with (
        pytest.raises(ValueError, match=r"no CBSA layer 'blocks.9.attn'; did you mean"),
        interpret.capture(model, ["blocks.9.attn"]),
    ):
        pass
    with pytest.raises(ValueError, match="Linear has no CBSA layer"), interpret.capture(torch.nn.Linear(2, 2)):
        pass


def test_rates_are_those_of_eq_2(model, images):
    rates = interpret.coding_rates(model, images.split(2))
    assert rates.images == 5
    with interpret.capture(model) as records:
        model(images)
    for i, record in enumerate(records.values()):
        per_image = []
        for tokens in record.stages.tokens.double():
            heads = [0.5 * torch.logdet(torch.eye(8).double() + 8 / (65 * 0.1**2) * z.T @ z) for z in tokens]
            per_image.append(sum(heads))
        per_image = torch.stack(per_image)
        assert rates.rate[i] == pytest.approx(per_image.mean().item(), rel=1e-5)
        assert rates.rate_std[i] == pytest.approx(per_image.std(correction=0).item(), rel=1e-3)
        unit = torch.nn.functional.normalize(record.stages.tokens, dim=-1)
        assert rates.normalized[i] == pytest.approx(ops.compression_rate(unit).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="at least one batch"):
        interpret.coding_rates(model, [])


def test_map_is_a_row_of_the_explicit_matrix(model, images):
    with interpret.capture(model) as records:
        model(images)
    record = records["blocks.0.attn"]
    attention = record.stages.attention
    full = attention.mT @ attention  # (B, H, N, N)
    assert_close(interpret.cls_attention_maps(record), full[:, :, 0, 1:].unflatten(-1, (8, 8)), 1e-6)
    assert_close(interpret.cls_attention_maps(record, 7), full[:, :, 7, 1:].unflatten(-1, (8, 8)), 1e-6)


def test_report_is_one_self_contained_page(model, images, tmp_path):
    history = [{"epoch": e, "train_loss": 1 / e, "val_loss": 1 / e, "val_top1": 1 - 0.5 / e} for e in (1, 2, 3)]
    evaluation = {
        "top1": 0.9,
        "loss": 0.3,
        "images": 10,
        "confusion": [[5, 0], [1, 4]],
        "class_names": ["<cat>", "dog"],
        "split": "test",
    }
    files = interpret.report(
        model,
        images,
        np.random.rand(5, 8, 8),
        tmp_path,
        title="A <b>model</b>",
        facts={"data": "5 & more"},
        history=history,
        evaluation=evaluation,
        image_titles=list("abcde"),
        shown=2,
    )
    page = files.page.read_text()
    assert "&lt;cat&gt;" in page
    assert "<b>model</b>" not in page
    assert "90.00 %" in page
    loaded = re.findall(r"""(?:src|href)=["'](?!data:|#)([^"']+)""", page)
    assert loaded == []  # nothing outside the file
    assert "@import" not in page
    numbers = json.loads(files.numbers.read_text())
    assert numbers["coding_rate"]["layers"] == [f"blocks.{i}.attn" for i in range(3)]
    assert {p.name for p in files.figures} == {
        f"{name}{suffix}"
        for name in ("coding_rate", "attention_maps", "learning_curves")
        for suffix in (".png", ".svg")
    }
    assert all(Path(p).stat().st_size > 1000 for p in files.figures)


def test_report_without_history_or_labels(model, images, tmp_path):
    files = interpret.report(model, images, np.random.rand(5, 8, 8), tmp_path, title="t", facts={})
    assert "Learning curves" not in files.page.read_text()
