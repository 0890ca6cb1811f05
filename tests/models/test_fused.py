"""Whole models fused for inference, by timm's ``reparameterize_model``: each computes what it did."""

import pickle

import accelerate
import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from cbsa_torch import interpret
from cbsa_torch.models import adapt_vit, save_checkpoint
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.models.registry import names
from cbsa_torch.nn import CBSA
from cbsa_torch.nn.fused import Fused
from tests.helpers.compare import assert_close

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
FEW = {"num_representatives": 4}
CERTIFIED = {"mixer": CBSA.with_options(step="certified", **FEW)}
ORTHOGONAL = {"tied": True, "orthogonal": True}
NAMES = [n for n in names() if not any(size in n for size in ("_small_", "_base_", "_large_"))]


def whitebox(name, **options):
    sizes = {**SMALL, **({"img_size": 32} if "_tiny_" in name else {})}
    return lambda: timm.create_model(name, **{**sizes, **options})


def segmenter(encoder, encoder_args, mixer="cbsa", **options):
    return lambda: timm.create_model(
        "segmenter",
        **{"encoder": encoder, "encoder_args": encoder_args, "mixer": mixer, "num_classes": 3, "depth": 1},
        **{"num_heads": 2, "head_dim": 8, **options},
    )


def adapted(mixer):
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return lambda: adapt_vit(timm.create_model("vit_tiny_patch16_224", **vit), mixer).model


CBT = "cbt_nano_patch4_32"
ENCODER = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}
MODELS = {
    **{name: whitebox(name) for name in NAMES},
    "tied": whitebox(CBT, tied=True, **FEW),
    "orthogonal": whitebox(CBT, **ORTHOGONAL, **FEW),
    "orthogonal crate": whitebox("crate_nano_patch4_32", **ORTHOGONAL),
    "certified": whitebox(CBT, **CERTIFIED),
    "certified, free residual": whitebox(CBT, residual="input", **CERTIFIED),
    "residual norm": whitebox(CBT, residual="norm", **FEW),
    "adapted cbsa": adapted("adapted_cbsa"),
    "adapted agent": adapted("agent"),
    "segmenter of a CBT": segmenter(
        "cbt_tiny_patch16_224", {**ENCODER, "patch_size": 8, **FEW}, mixer_args=FEW
    ),
    "segmenter of a ViT": segmenter("vit_tiny_patch16_224", {**ENCODER, "patch_size": 8}, mixer_args=FEW),
    "certified segmenter": segmenter(
        "cbt_tiny_patch16_224",
        {**ENCODER, "patch_size": 8, "step": "certified"},
        mixer_args={"step": "certified", **FEW},
    ),
    "one layer": whitebox(CBT, depth=1, **ORTHOGONAL, **FEW),
    "features": whitebox(CBT, features_only=True, out_indices=(0, 1)),
}


def build(name, dtype=torch.float32, batch=2):
    """A model whose norms and statistics matter, in evaluation mode, and images."""
    model = MODELS[name]().to(dtype)
    channels = next(module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    chans = channels.in_channels if isinstance(channels, nn.Conv2d) else 3
    side = 8 if "_8" in name else 28 if "_28" in name else 64 if "_64" in name else 32
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return model.eval(), torch.randn(batch, chans, side, side, dtype=dtype)


def as_list(out):
    return list(out) if isinstance(out, (list, tuple)) else [out]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_fused_model_computes_the_same(name):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model, x = build(name, dtype)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        fused = reparameterize_model(model)
        ista = [module for module in model.modules() if type(module).__name__ == "ISTA"]
        assert sum(type(module).__name__ == "FusedISTA" for module in fused.modules()) == len(ista)
        assert not any(
            isinstance(m, nn.BatchNorm2d) or nn.utils.parametrize.is_parametrized(m) for m in fused.modules()
        )
        for actual, expected in zip(as_list(fused(x)), as_list(model(x)), strict=True):
            assert_close(actual, expected, tolerance)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], value) for key, value in before.items())


@torch.no_grad()
def test_it_gives_features_and_takes_other_sizes_heads_and_copies():
    model, x = build("orthogonal")
    fused = reparameterize_model(model)
    wide = torch.randn(2, 3, 40, 24)
    given, expected = (m.forward_intermediates(wide, norm=True) for m in (fused, model))
    for actual, wanted in zip([given[0], *given[1]], [expected[0], *expected[1]], strict=True):
        assert_close(actual, wanted, 1e-5)
    assert_close(fused.forward_head(fused.forward_features(x)), model(x), 1e-5)
    for other in (reparameterize_model(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), fused(x))
    for m in (fused, model):
        m.set_input_size((16, 24))
        m.reset_classifier(0)
    assert_close(fused(wide), model(wide), 1e-5)
    fused.prune_intermediate_layers(1)
    assert isinstance(fused.blocks[0].ista, Fused)


@pytest.mark.parametrize("name", ["orthogonal", "segmenter of a CBT"])
@torch.no_grad()
def test_it_runs_in_low_precision(name):
    model, x = build(name)
    fused, exact = reparameterize_model(model), model.double()(x.double())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(m(x).double() - exact).norm() for m in (model, fused)]
    assert errors[1] <= 2 * errors[0] <= 0.1 * exact.norm()
    fused.bfloat16()  # which bases made orthonormal in every call do not allow
    assert (fused(x.bfloat16()).double() - exact).norm() <= 0.1 * exact.norm()


@torch.no_grad()
def test_it_is_compiled_in_one_graph():
    torch.compiler.reset()
    model, x = build("one layer")
    compiled = torch.compile(reparameterize_model(model), backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), model(x), 1e-5)


@torch.no_grad()
def test_it_is_exported():
    model, x = build("one layer")
    program = torch.export.export(
        reparameterize_model(model), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    more = torch.randn(5, *x.shape[1:])
    assert_close(program.module()(more), model(more), 1e-5)


@torch.no_grad()
def test_onnx(tmp_path):
    import onnxruntime

    model, x = build("one layer")
    path = tmp_path / "model.onnx"
    torch.onnx.export(reparameterize_model(model), (x,), dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(out), model(x), 1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_are_loaded_before_fusing(strict):
    model, x = build("orthogonal")
    fused = reparameterize_model(model)
    with pytest.raises(
        RuntimeError, match=r"ista is fused and takes no weights of its parts .*before fusing"
    ) as error:
        fused.load_state_dict(model.state_dict(), strict=strict)
    assert all(f"{part} is fused" in str(error.value) for part in ("stem.proj.0", "blocks.0.attn.qkv"))
    other = reparameterize_model(build("orthogonal")[0])
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), fused(x))


def test_it_is_not_trained():
    model, x = build("orthogonal")
    fused = reparameterize_model(model.train())  # as timm's scripts do, before they call eval()
    assert_close(fused.eval()(x), model.eval()(x), 1e-5)
    prepared = accelerate.Accelerator(cpu=True).prepare(fused)
    for m in (fused, prepared, torch.compile(fused, backend="eager"), nn.DataParallel(fused)):
        with pytest.raises(RuntimeError, match="is fused for inference and cannot be trained"):
            m.train()
    before = {name: value.clone() for name, value in fused.eval().named_buffers()}
    optimizer = torch.optim.AdamW(fused.requires_grad_(True).parameters(), lr=0.1, weight_decay=0.1)
    fused(x).square().mean().backward()
    optimizer.step()  # of the rest, such as the head
    assert before.keys() >= {"stem.proj.0.weight", "blocks.0.ista.matrix", "blocks.0.attn.qkv.weight"}
    assert all(torch.equal(value, before[name]) for name, value in fused.named_buffers())


def test_a_hooked_layer_in_it_is_refused():
    model, _ = build("certified")
    handle = model.blocks[1].ista.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="ISTA cannot be fused: it has hooks"):
        reparameterize_model(model)
    handle.remove()
    reparameterize_model(model)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_quantised_projections_stay_so():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def projections(model):
        quantize_(model, Int8WeightOnlyConfig(), lambda _, name: name.endswith(("attn.qkv", "attn.proj")))
        return model

    model, x = build("tied")
    exact = model(x)
    quantised = projections(model)
    fused = reparameterize_model(quantised)
    assert not torch.equal(quantised(x), exact)
    assert_close(fused(x), quantised(x), 1e-5)
    model, x = build("orthogonal")
    after = projections(reparameterize_model(model))  # of bases, which cannot be quantised before
    assert type(after.blocks[0].attn.qkv.weight).__name__ != "Tensor"
    assert_close(after(x), model(x), 5e-2)


def test_it_is_not_saved(tmp_path):
    name, path = "cbt_pico_patch1_8", tmp_path / "m.safetensors"
    fused = reparameterize_model(timm.create_model(name))
    with pytest.raises(
        CheckpointError, match=r"fused for inference \(e\.g\. stem\.proj\.0\).*save it before fusing"
    ):
        save_checkpoint(path, fused, {"model": name, "model_args": {}})
    assert not path.exists()


@torch.no_grad()
def test_it_is_measured_as_before():
    model, x = build("certified", torch.float64)
    fused = reparameterize_model(model)
    sparsity = [interpret.ista_sparsity(m, [x]) for m in (fused, model)]
    assert sparsity[0] == sparsity[1]
    assert sum(sparsity[0].zeros) > 0
    for mine, theirs in zip(*(interpret.certificate(m, x).certified for m in (fused, model)), strict=True):
        assert mine.broken is theirs.broken is None
        assert bool(mine.holds.all())
        assert_close(mine.after, theirs.after, 1e-10)
    first, second = (interpret.subspace_coherence(m) for m in (fused, model))
    assert_close(first["blocks.0.attn"], second["blocks.0.attn"], 1e-10)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn is fused.*give the model that was fused"):
        interpret.noisy_copy(fused, 0.1)
    free = build("residual norm")[0]
    noisy = [interpret.noisy_copy(m, 0.1) for m in (reparameterize_model(free), free)]
    assert_close(noisy[0](x.float()), noisy[1](x.float()), 1e-5)
