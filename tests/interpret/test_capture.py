import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import cbsa_torch.models  # noqa: F401
from cbsa_torch import CBSA, MSSA, TSSA, interpret
from cbsa_torch.nn import AgentAttention
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, HEADS, MIXERS, each_name, merge, split


def cbt(**options):
    options = {"embed_dim": 16, "depth": 3, "num_heads": 2, "num_representatives": 9, **options}
    return timm.create_model("cbt_pico_patch1_8", **options).eval()


def vit(**options):
    options = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 12, "num_heads": 3, **options}
    return VisionTransformer(depth=3, num_classes=2, **options).eval()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def stored_bytes(records):
    """Bytes of all storages that the records keep alive, each counted once."""
    tensors, pending = [], list(records.values())
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif isinstance(item, tuple):
            pending.extend(item)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@each_name
def test_every_mixer_is_recorded_in_its_subspaces(name):
    model = nn.Sequential(MIXERS[name]()).double()
    x = torch.randn(2, 16, DIM).double()
    with interpret.capture(model) as records:
        model(x)
    record = records["0"]
    assert (record.name, record.layer) == ("0", model[0])
    inner = DIM
    projected = model[0].qkv(x)
    assert_close(record.tokens, split(projected[..., :inner]), 1e-12)
    if projected.shape[-1] == inner:
        assert record.keys is None
    else:
        assert_close(record.keys, split(projected[..., inner : 2 * inner]), 1e-12)
    assert (record.stages is not None) == isinstance(model[0], CBSA)
    assert (record.agents is not None) == isinstance(model[0], AgentAttention)
    if record.stages is not None:
        merged = merge(record.stages.output)
        expected = merged @ model[0].qkv.weight if model[0].proj is None else model[0].proj(merged)
        assert_close(model[0](x), expected, 1e-10)
        assert record.stages.tokens.data_ptr() == record.tokens.data_ptr()
        contributions = record.stages.broadcast_attention @ record.stages.contracted
        step = record.stages.step[..., None, None]
        assert_close(record.stages.output, step * contributions, 1e-10)
        if record.step_tokens is not None:
            m, n = record.stages.attention.shape[2:]
            unit = n / m if model[0].step == "relative" else 1
            assert (record.stages.step == unit * record.step_tokens).all()
    for step in ("step_tokens", "step_representatives"):
        copy, parameter = getattr(record, step), getattr(model[0], step, None)
        assert (copy is None) == (parameter is None)
        assert copy is None or torch.equal(copy, parameter)
    kept = (record.tokens, record.keys, record.step_tokens, record.step_representatives)
    assert not any(t.requires_grad for t in kept if t is not None)


@each_name
def test_masked_tokens_are_zero_in_the_record(name):
    model = nn.Sequential(MIXERS[name](qkv_bias="orthogonal" not in name)).double()
    x = torch.randn(1, 16, DIM).double()
    real = torch.ones(1, 16, dtype=torch.bool)
    real[0, 10:] = False
    with interpret.capture(model) as records:
        model[0](token_mask=real, x=x.masked_fill(~real[..., None], torch.nan))  # in any order
    record = records["0"]
    assert torch.equal(record.token_mask, real)
    for tensor in (record.tokens, record.keys):
        if tensor is not None:
            assert tensor.isfinite().all()
            assert tensor[:, :, 10:].abs().max() == 0


def test_a_timm_vit_is_recorded_after_its_norms():
    model = vit(qk_norm=True, reg_tokens=2)
    images, seen = torch.randn(2, 1, 8, 8), {}
    handle = model.blocks[1].attn.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    with interpret.capture(model) as records:
        model(images)
    handle.remove()
    assert list(records) == [f"blocks.{i}.attn" for i in range(3)]
    record, attn = records["blocks.1.attn"], model.blocks[1].attn
    qkv = attn.qkv(seen["x"]).reshape(2, 19, 3, 3, 4).permute(2, 0, 3, 1, 4)
    assert_close(record.tokens, attn.q_norm(qkv[0]), 1e-6)
    assert_close(record.keys, attn.k_norm(qkv[1]), 1e-6)
    assert (record.grid_size, record.num_prefix_tokens, record.stages) == ((4, 4), 3, None)


def test_grids_come_from_the_model_around_the_layer():
    images = torch.randn(1, 1, 8, 12)
    for layer in (Attention, MSSA, TSSA, AgentAttention):
        model = vit(img_size=(8, 12), attn_layer=layer)
        if layer is AgentAttention:  # it needs the grid itself
            for block in model.blocks:
                block.attn.set_input_size((4, 6), 1)
        wrapped = nn.ModuleDict({"encoder": model})
        with interpret.capture(wrapped, [0]) as records:
            model(images)
        record = records["encoder.blocks.0.attn"]
        assert (record.grid_size, record.num_prefix_tokens) == ((4, 6), 1)
    flexible = vit(dynamic_img_size=True)  # made for 8 x 8
    with interpret.capture(flexible) as records:
        flexible(images)
    assert records["blocks.0.attn"].grid_size == (4, 6)
    alone = nn.Sequential(Attention(12, 3))
    for tokens, expected in ((17, ((4, 4), 1)), (16, ((4, 4), 0)), (7, (None, 0))):
        with interpret.capture(alone) as records:
            alone(torch.randn(1, tokens, 12))
        assert (records["0"].grid_size, records["0"].num_prefix_tokens) == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([1], [1]),
        ([-1], [2]),
        ([2, 0, "blocks.0.attn"], [0, 2]),
        (("blocks.1.attn", -1), [1, 2]),
        (None, [0, 1, 2]),
    ],
)
def test_layers_by_name_and_index(layers, expected):
    model = cbt()
    with interpret.capture(model, layers) as records:
        model(torch.randn(1, 1, 8, 8))
    assert list(records) == [f"blocks.{i}.attn" for i in expected]


@pytest.mark.parametrize(
    ("layers", "kind", "message"),
    [
        ([3], IndexError, "no attention layer 3; there are 3, 0 to 2, or -3 to -1"),
        ([-4], IndexError, "no attention layer -4"),
        (["blocks.0.atn"], ValueError, "no attention layer 'blocks.0.atn'; did you mean 'blocks.0.attn'"),
        ([], ValueError, "at least one name or index"),
        ([True], TypeError, "got True of type bool"),
        ([1.0], TypeError, "got 1.0 of type float"),
        ("blocks.0.attn", TypeError, "must be a sequence"),
        (1, TypeError, "must be a sequence"),
    ],
)
def test_layers_that_are_not_there(layers, kind, message):
    model = cbt()
    with pytest.raises(kind, match=message), interpret.capture(model, layers):
        pass
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="Linear has no CBSA layer, nor any other attention"):
        interpret.capture(nn.Linear(2, 2)).__enter__()


@pytest.mark.parametrize("build", [cbt, vit])
def test_hooks_are_gone_whatever_happens(build):
    def interrupt(*_):
        raise KeyboardInterrupt

    model, images = build(), torch.randn(1, 1, 8, 8)
    with interpret.capture(model):
        assert hooks(model) > 0
        model(images)
    assert hooks(model) == 0
    handle = model.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), interpret.capture(model) as records:
        model(images)
    handle.remove()
    assert hooks(model) == 0
    assert list(records) == ["blocks.0.attn"]


@pytest.mark.parametrize(
    "name", ["mhsa", "mssa", "tssa", "linear", "agent", "agent shared", "cbsa", "cbsa separate", "cbsa learned"]
)
def test_a_record_keeps_what_it_names_once_and_no_more(name):
    model = nn.Sequential(MIXERS[name]())
    with interpret.capture(model) as records:
        model(torch.randn(4, 64, DIM))
    record = records["0"]
    if record.stages is None:
        named = [record.tokens, *(record.agents or ())]
    else:
        named = record.stages._replace(broadcast_attention=None)  # the attention, transposed
    named = [*named, record.keys, record.step_tokens, record.step_representatives]
    assert stored_bytes(records) == sum(
        t.numel() * t.element_size() for t in named if isinstance(t, torch.Tensor)
    )


def test_only_the_last_pass_and_the_chosen_layers_are_kept():
    model, images = cbt(), torch.randn(2, 1, 8, 8)
    with interpret.capture(model) as every:
        model(images)
        once = stored_bytes(every)
        model(images)
        assert stored_bytes(every) == once
    with interpret.capture(model, [0]) as one:
        model(images)
    assert stored_bytes(one) == stored_bytes({"": every["blocks.0.attn"]}) < once / 2


def test_records_do_not_change_with_the_parameters():
    model = nn.Sequential(CBSA(DIM, HEADS, representatives="learned", num_representatives=4))
    with interpret.capture(model) as records:
        model(torch.randn(1, 9, DIM))
    record = records["0"]
    kept = (record.stages.representatives, record.step_tokens, record.step_representatives)
    before = [t.clone() for t in kept]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(*pair) for pair in zip(kept, before, strict=True))


def test_a_subclass_with_its_own_forward_is_not_timms_attention():
    class Other(Attention):
        def forward(self, x):
            return x

    class Same(Attention):
        pass

    model = nn.Sequential(Other(12, 3), Same(12, 3))
    with interpret.capture(model) as records:
        model(torch.randn(1, 4, 12))
    assert list(records) == ["1"]


def test_a_compiled_vit_is_captured_too():
    model, images = vit(), torch.randn(2, 1, 8, 8)
    compiled = torch.compile(model, backend="eager")
    expected = compiled(images)
    with interpret.capture(compiled, [-1]) as records:
        assert_close(compiled(images), expected, 1e-6)
    assert list(records) == ["blocks.2.attn"]
    assert records["blocks.2.attn"].grid_size == (4, 4)


@torch.no_grad()
def test_a_compiled_layer_keeps_its_name():
    model, images = cbt(), torch.randn(2, 1, 8, 8)
    with interpret.capture(model, [1]) as records:
        expected = model(images)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.blocks[1].attn = torch.compile(model.blocks[1].attn, backend="eager")
    assert_close(model(images), expected, 1e-6)
    plain = records["blocks.1.attn"]
    with interpret.capture(model, ["blocks.1.attn"]) as records:
        assert_close(model(images), expected, 1e-6)
    (record,) = records.values()
    assert_close(record.tokens, plain.tokens, 1e-6)
    assert (record.name, record.grid_size, record.num_prefix_tokens) == ("blocks.1.attn", (8, 8), 1)
    with interpret.capture(model) as records:
        model(images)
    assert list(records) == [f"blocks.{i}.attn" for i in range(3)]
    assert hooks(model) == 0


def test_a_layer_that_is_the_model_has_no_name_compiled_or_not():
    layer, x = MSSA(DIM, HEADS), torch.randn(1, 16, DIM)
    for model in (layer, torch.compile(layer, backend="eager")):
        with interpret.capture(model, [0]) as records:
            model(x)
        assert list(records) == [""]


def test_capture_under_autocast():
    model = nn.Sequential(MSSA(DIM, HEADS), CBSA(DIM, HEADS, num_representatives=4))
    with interpret.capture(model) as records, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 16, DIM))
    assert records["0"].tokens.dtype == torch.bfloat16
    assert records["1"].stages.attention.dtype == torch.float32


def test_offloaded_layers_are_refused():
    accelerate = pytest.importorskip("accelerate", reason="offloads the model")
    model = cbt()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with (
        pytest.raises(ValueError, match=r"blocks.0.attn keeps its weights elsewhere"),
        interpret.capture(model),
    ):
        model(torch.randn(1, 1, 8, 8))
