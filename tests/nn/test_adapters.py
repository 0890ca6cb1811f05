"""Adapters, low precision, offloading and per-sample gradients on every mixer: right, or refused with the reason."""

import copy

import pytest
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrize

from cbsa_torch.nn import MSSA, AgentAttention, ConvStem
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, MIXERS, ORTHOGONAL, of

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
    "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning",
)
TIED = {
    "mssa tied": of(MSSA, tied=True),
    "agent shared tied": of(AgentAttention, qkv="shared", tied=True, num_representatives=4),
}
BUILDERS = {**MIXERS, **TIED}
PLAIN = [name for name in BUILDERS if name not in ORTHOGONAL]
each_name = pytest.mark.parametrize("name", BUILDERS)
each_plain = pytest.mark.parametrize("name", PLAIN)
X = torch.randn(3, 16, DIM, generator=torch.Generator().manual_seed(2))


class Residual(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x):
        return x + self.attn(x)


def built(name):
    return Residual(BUILDERS[name]()).eval()


def targets(model):
    return [name for name in ("qkv", "proj") if getattr(model.attn, name) is not None]


def update_error(changed, model):
    """Of the mixer's update, relative."""
    with torch.no_grad():
        expected = model(X) - X
        return ((changed(X) - X - expected).norm() / expected.norm()).item()


# --- adapters


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@each_plain
def test_adapters_act_merge_and_are_saved(name, dora, tmp_path):
    import peft

    base = built(name)
    config = peft.LoraConfig(r=2, target_modules=targets(base), init_lora_weights=False, use_dora=dora)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    out = model(X)
    assert update_error(model, base) > 0.01
    assert_close(copy.deepcopy(model).merge_and_unload()(X), out, 1e-5)
    model.save_pretrained(tmp_path)
    assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(X), out, 1e-6)
    model.train()(X).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("name", ORTHOGONAL)
def test_an_adapter_on_orthonormal_bases_is_refused(name):
    import peft

    model = peft.get_peft_model(built(name), peft.LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(ValueError, match="qkv has orthonormal rows.*Leave qkv out of target_modules"):
        model(X)
    base = built(name)
    parametrize.remove_parametrizations(base.attn.qkv, "weight")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False))
    if "certified" not in name:  # such a step needs orthonormal rows
        assert_close(copy.deepcopy(model).merge_and_unload()(X), model(X), 1e-5)
    saved = peft.LoraConfig(r=2, target_modules=["other"], modules_to_save=["qkv"])
    base = built(name)
    model = peft.get_peft_model(nn.ModuleDict({"it": base, "other": nn.Linear(2, 2)}), saved)
    assert_close(model.base_model.model["it"](X), built_like(base, name)(X), 1e-6)


def built_like(base, name):
    model = built(name)
    state = {
        key.replace("original_module.", ""): v for key, v in base.state_dict().items() if "to_save" not in key
    }
    model.load_state_dict(state)
    return model


# --- low precision


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@each_plain
def test_int8_of_torchao(name, kind):
    from torchao import quantization

    base = built(name)
    model = copy.deepcopy(base)
    quantization.quantize_(model, getattr(quantization, kind)())
    assert type(model.attn.qkv.weight) is not nn.Parameter
    assert 0 < update_error(model, base) < 0.03
    if kind == "Int8WeightOnlyConfig":  # exactly what the dequantised weights compute
        twin = copy.deepcopy(base)
        for target in targets(base):
            layer = getattr(model.attn, target)
            getattr(twin.attn, target).weight = nn.Parameter(layer.weight.dequantize())
        assert_close(model(X), twin(X), 1e-4)


@pytest.mark.parametrize("name", ORTHOGONAL)
def test_int8_of_orthonormal_bases_is_refused_until_they_are_fused(name):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = built(name)
    with pytest.raises(ValueError, match="weight is computed from a parameter.*fuse the model"):
        quantize_(copy.deepcopy(base), Int8WeightOnlyConfig())
    fused = reparameterize_model(base)
    quantize_(fused, Int8WeightOnlyConfig())
    assert 0 < update_error(fused, base) < 0.05


@each_name
def test_dynamic_quantisation_of_torch(name):
    base = built(name)
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(base), {nn.Linear}, dtype=torch.qint8)
    assert update_error(model, base) < 0.05  # orthonormal bases stay as they are


@pytest.mark.parametrize("to", ["cpu", "disk"])
@each_name
def test_offloaded_weights(name, to, tmp_path):
    import accelerate

    base, device = built(name), torch.device("cpu")
    model = copy.deepcopy(base)
    if to == "cpu":
        accelerate.cpu_offload(model, device)
    else:
        accelerate.disk_offload(model, tmp_path, device)
    assert all(parameter.is_meta for parameter in model.attn.qkv.parameters())
    assert_close(model(X), base(X), 1e-6)


@each_name
def test_fused(name):
    base = built(name)
    assert_close(reparameterize_model(base)(X), base(X), 1e-5)


# --- gradients per sample


def one_by_one(model, x):
    """The gradients of the loss of every sample, alone."""
    found = []
    for sample in x:
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        found.append(
            {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        )
    model.zero_grad()  # the last ones are those that were found
    return found


@each_name
def test_gradients_per_sample_by_torch_func(name):
    model, x = built(name).double(), X.double()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(values, sample):
        return torch.func.functional_call(model, values, (sample[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, expected in enumerate(one_by_one(model, x)):
        for key, gradient in expected.items():
            assert_close(found[key][i], gradient, 1e-8)


# Tied projections are refused, see below; learned agents call a module with None, which Opacus cannot record.
NOT_BY_OPACUS = ("mssa tied", "mssa tied orthogonal", "agent shared tied", "agent learned")
BY_OPACUS = [name for name in BUILDERS if name not in NOT_BY_OPACUS]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of the first layer
@pytest.mark.parametrize("name", BY_OPACUS)
def test_gradients_per_sample_by_opacus(name):
    opacus = pytest.importorskip("opacus", reason="Opacus is not installed: make test-opacus")
    model, x = nn.Sequential(nn.Linear(DIM, DIM), built(name)).double().train(), X.double()
    expected = one_by_one(model, x)
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    wrapped(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert_close(parameter.grad_sample, torch.stack([each[key] for each in expected]), 1e-8)


@pytest.mark.parametrize("name", TIED)
def test_opacus_on_tied_projections_is_refused_where_it_sees_half_the_gradient(name):
    opacus = pytest.importorskip("opacus", reason="Opacus is not installed: make test-opacus")
    model = opacus.GradSampleModule(built(name).train(), loss_reduction="sum")
    with pytest.raises(ValueError, match="a tied projection uses its weight twice, and Opacus"):
        model(X)


def test_a_convolutional_stem_has_no_gradients_per_sample_in_training():
    stem, images = ConvStem(3, 8, 4), torch.randn(2, 3, 8, 8)
    parameters, buffers = dict(stem.named_parameters()), dict(stem.named_buffers())

    def loss(values, image):
        return torch.func.functional_call(stem, (values, buffers), (image[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    with pytest.raises(
        ValueError, match="no gradient per sample. Use stem='linear', or put the stem into eval mode"
    ):
        per_sample(parameters, images)
    stem.eval()
    assert per_sample(parameters, images)["proj.0.0.weight"].shape == (2, 4, 3, 3, 3)
