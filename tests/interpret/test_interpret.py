import pytest
import timm
import torch

import cbsa_torch.models  # noqa: F401
from cbsa_torch import CBSA, interpret, ops
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
        pytest.raises(ValueError, match=r"no attention layer 'blocks.9.attn'; did you mean"),
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


def test_records_of_masked_layers_are_those_of_the_items_alone():
    layer = torch.nn.Sequential(CBSA(8, 2, num_representatives=4, num_prefix_tokens=1)).double()
    x = torch.randn(1, 17, 8).double()
    real = torch.zeros(1, 17, dtype=torch.bool)
    real[0, :4] = True  # the class token and a 1 x 3 corner of a 4 x 4 grid
    with interpret.capture(layer) as padded:
        layer[0](x, (4, 4), attn_mask=real[:, None])
    with interpret.capture(layer) as alone:
        layer[0](x[:, real[0]], (1, 3))
    assert torch.equal(padded["0"].token_mask, real)
    maps = interpret.cls_attention_maps(padded["0"])[..., 0, :3]
    assert_close(maps, interpret.cls_attention_maps(alone["0"])[..., 0, :], 1e-12)
    rates = [ops.compression_rate(r["0"].stages.tokens, token_mask=r["0"].token_mask) for r in (padded, alone)]
    assert_close(rates[0], rates[1], 1e-12)


def test_learned_representatives_need_no_grid():
    layer = torch.nn.Sequential(CBSA(8, 2, representatives="learned", num_representatives=4))
    with interpret.capture(layer) as records:
        layer(torch.randn(2, 7, 8))
    assert records["0"].grid_size is None
    with pytest.raises(ValueError, match="0 has no grid to lay a map out on"):
        interpret.cls_attention_maps(records["0"])
    assert interpret.coding_rates(layer, [torch.randn(2, 7, 8)]).images == 2


def test_a_compiled_model_is_captured_too(model, images):
    compiled = torch.compile(model, backend="eager")
    expected = compiled(images)
    with interpret.capture(compiled) as records:
        assert_close(compiled(images), expected, 1e-6)
    assert list(records) == [f"blocks.{i}.attn" for i in range(3)]
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    with interpret.capture(model, ["blocks.0.attn"]) as records:
        model(images)
    assert list(records) == ["blocks.0.attn"]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda m, x: interpret.capture(m, "blocks.0.attn").__enter__(),
            TypeError,
            "layers must be a sequence",
        ),
        (lambda m, x: interpret.coding_rates(m, [(x, 1)]), TypeError, "batches must yield tensors"),
    ],
)
def test_bad_arguments_are_named(model, images, call, kind, message):
    with pytest.raises(kind, match=message):
        call(model, images)
