"""Adapters, low precision, offloading and per-sample gradients on whole models.

Every family, adapted ViTs and segmenters; of single layers see ``tests/nn/test_adapters.py``.
"""

import copy

import pytest
import torch
from torch import nn

from cbsa_torch.models.registry import FAMILIES
from tests.helpers.compare import assert_close, relative_error
from tests.helpers.exports import MODELS, stirred

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
    "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning",
)
WHOLE = [name for name in MODELS if not name.startswith("layer")]
ORTHOGONAL = ["cbt certified"]
each_model = pytest.mark.parametrize("name", WHOLE)
IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))


def built(name):
    return stirred(MODELS[name]())


@each_model
def test_adapters_act_merge_and_are_saved(name, tmp_path):
    import peft

    base = built(name)
    linear = [layer for layer, module in base.named_modules() if isinstance(module, nn.Linear)]
    targets = ["head"] if name in ORTHOGONAL else [layer for layer in linear if ".attn." in layer]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    out = model(IMAGES)
    assert relative_error(out, base(IMAGES)) > 1e-3
    assert_close(copy.deepcopy(model).merge_and_unload()(IMAGES), out, 1e-5)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_close(again(IMAGES), out, 1e-6)


@each_model
@torch.no_grad()
def test_int8_of_torchao(name):
    from torchao import quantization

    base = built(name)
    model, twin = copy.deepcopy(base), copy.deepcopy(base)
    if name in ORTHOGONAL:
        with pytest.raises(ValueError, match="weight is computed from a parameter.*fuse the model"):
            quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear):
            twin.get_submodule(layer).weight = nn.Parameter(module.weight.dequantize())
    assert not torch.equal(model(IMAGES), base(IMAGES))
    assert_close(model(IMAGES), twin(IMAGES), 1e-4)
    quantization.quantize_(base, quantization.Int8DynamicActivationInt8WeightConfig())
    assert_close(base(IMAGES), twin(IMAGES), 0.25)  # small outputs of large tokens


@each_model
@torch.no_grad()
def test_dynamic_quantisation_of_torch(name):
    """It rounds weights and inputs of linear layers; the twin does so in plain PyTorch."""

    def rounded(layer, args):
        reduce_range = torch.backends.quantized.engine != "qnnpack"
        return torch.quantize_per_tensor_dynamic(args[0], torch.quint8, reduce_range).dequantize()

    base = built(name)
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(base), {nn.Linear}, dtype=torch.qint8)
    twin = copy.deepcopy(base)
    for layer, module in model.named_modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            original = twin.get_submodule(layer)
            original.weight = nn.Parameter(module.weight().dequantize())
            original.register_forward_pre_hook(rounded)
    assert not torch.equal(model(IMAGES), base(IMAGES))
    assert_close(model(IMAGES), twin(IMAGES), 1e-5)


@pytest.mark.parametrize("to", ["cpu", "disk"])
@each_model
@torch.no_grad()
def test_offloaded_weights(name, to, tmp_path):
    import accelerate

    def offload(**options):
        model, device = copy.deepcopy(base), torch.device("cpu")
        if to == "cpu":
            accelerate.cpu_offload(model, device, **options)
        else:
            accelerate.disk_offload(model, tmp_path, device, **options)
        assert all(parameter.is_meta for parameter in model.parameters())
        return model

    base, options = built(name), {}
    if name.startswith("segmenter"):
        with pytest.raises(ValueError, match="encoder is offloaded.*preload_module_classes"):
            offload()(IMAGES)
        options = {"preload_module_classes": ["Segmenter"]}
    model = offload(**options)
    for _ in range(2):
        assert_close(model(IMAGES), base(IMAGES), 1e-6)


@each_model
def test_gradients_per_sample_by_torch_func(name):
    model, images = built(name).double(), IMAGES.double()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(values, image):
        return torch.func.functional_call(model, (values, buffers), (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        alone = torch.autograd.grad(
            model(image[None]).square().sum(), list(parameters.values()), materialize_grads=True
        )
        for key, gradient in zip(parameters, alone, strict=True):
            assert_close(found[key][i], gradient, 1e-8)


BY_OPACUS = [*FAMILIES, *(n for n in WHOLE if n.startswith("adapted") and n != "adapted eva")]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of the first layer
@pytest.mark.parametrize("name", BY_OPACUS)
def test_gradients_per_sample_by_opacus(name):
    opacus = pytest.importorskip("opacus", reason="Opacus is not installed: make test-opacus")
    stem = {"stem": "linear"} if name in FAMILIES and name != "crate_original" else {}
    model, images = stirred(MODELS[name](**stem)).double().train(), IMAGES.double()
    alone = []
    for image in images:
        loss = model(image[None]).square().sum()
        alone.append(torch.autograd.grad(loss, [*model.parameters()], materialize_grads=True))
    opacus.GradSampleModule(model, loss_reduction="sum")(images).square().sum().backward()
    for parameter, expected in zip(model.parameters(), zip(*alone, strict=True), strict=True):
        assert_close(parameter.grad_sample, torch.stack(expected), 1e-8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cbt", "Model contains a trainable layer with buffers"),  # batch norms of the convolutional stem
        ("adapted eva", "Model contains a trainable layer with buffers"),  # timm's rotary embedding
        ("segmenter", "'tuple' object has no attribute 'detach'"),  # the size that decoders are given
    ],
    ids=["cbt", "adapted eva", "segmenter"],
)
def test_what_opacus_does_not_take(name, message):
    opacus = pytest.importorskip("opacus", reason="Opacus is not installed: make test-opacus")
    with pytest.raises((NotImplementedError, AttributeError), match=message):
        opacus.GradSampleModule(built(name).train(), loss_reduction="sum")(IMAGES)


@pytest.mark.parametrize("name", ["crate_original", "adapted", "adapted agent", "adapted linear"])
@torch.no_grad()
def test_compiled_in_one_graph(name):
    """Other families: ``test_models.py``; segmenters: ``segmentation/test_model.py``."""
    torch.compiler.reset()
    model = built(name)
    assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(IMAGES), model(IMAGES), 1e-5)
