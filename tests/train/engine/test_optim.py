from __future__ import annotations

import io

import pytest
import timm
import torch
from timm.scheduler import PolyLRScheduler

import cbsa_torch.models  # noqa: F401
from cbsa_torch.models import load_checkpoint, save_checkpoint
from cbsa_torch.train.config import OptimConfig
from cbsa_torch.train.engine.accelerate import to_channels_last
from cbsa_torch.train.engine.optim import has_fused, make_optimizer, make_scheduler

ARGS = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_representatives": 4}
MODEL = "cbt_nano_patch4_32"


def build(channels_last: bool):
    torch.manual_seed(0)
    model = timm.create_model(MODEL, **ARGS)
    return to_channels_last(model) if channels_last else model


def steps(model, optimizer, first, last):
    for i in range(first, last):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(i))
        model(images).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def optimizer_of(model, name):
    return make_optimizer(model, OptimConfig(name=name, lr=1e-2))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_which_optimisers_are_fused():
    fused = [name for name in ("adamw", "adam", "sgd", "lion", "lamb", "nadam") if has_fused(name)]
    assert fused == ["adamw", "adam", "sgd"]
    assert not has_fused("fusedadam")  # of apex, which is not installed
    assert has_fused("adamw", sharded=True)
    assert not has_fused("momentum", sharded=True)
    assert optimizer_of(build(False), "adamw").param_groups[0]["fused"]
    assert "fused" not in optimizer_of(build(False), "lion").param_groups[0]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_stopped_and_resumed_is_bit_for_bit_the_same(name, channels_last):
    model = build(channels_last)
    whole = steps(model, optimizer_of(model, name), 0, 6)

    model = build(channels_last)
    optimizer = optimizer_of(model, name)
    steps(model, optimizer, 0, 3)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = build(channels_last)
    optimizer = optimizer_of(resumed, name)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    steps(resumed, optimizer, 3, 6)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def fused_and_plain(name, train):
    """The weights of a convolution after training it with a fused optimiser, and with one that is not."""
    for fused in (True, False):
        torch.manual_seed(0)
        conv = to_channels_last(torch.nn.Conv2d(3, 8, 3))
        optimizer = optimizer_of(conv, name)
        for group in optimizer.param_groups:
            group["fused"] = fused
        train(conv, optimizer)
        yield conv.weight.detach()


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "momentum"])
def test_a_state_in_another_layout_is_read_right(name):
    """A file need not keep strides. Torch's fused steps on the CPU do not look at them: unguarded, this fails."""

    def train(conv, optimizer):
        for step in range(4):
            conv(torch.randn(2, 3, 8, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                state = through_a_file(optimizer.state_dict())
                for entry in state["state"].values():
                    for key, value in entry.items():
                        entry[key] = None if value is None else value.contiguous()
                optimizer = optimizer_of(conv, name)
                optimizer.load_state_dict(state)

    assert torch.allclose(*fused_and_plain(name, train), atol=1e-5)


def test_channels_last_changes_rounding_alone(tmp_path):
    plain, last = build(False).eval(), build(True).eval()
    conv = last.stem.proj[0][0].weight
    assert conv.is_contiguous(memory_format=torch.channels_last)
    assert not conv.is_contiguous()
    images = torch.randn(2, 3, 32, 32)
    tokens = last.stem(images).flatten(2).transpose(1, 2)
    assert tokens.is_contiguous()
    assert torch.allclose(plain(images), last(images), atol=1e-5)
    save_checkpoint(tmp_path / "m.safetensors", last, {"model": MODEL, "model_args": ARGS})
    loaded, _ = load_checkpoint(tmp_path / "m.safetensors")
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, last.state_dict()[key])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_gradient_in_another_layout_is_read_right(name):
    def train(conv, optimizer):
        for _ in range(3):
            for parameter in conv.parameters():
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()

    assert torch.allclose(*fused_and_plain(name, train), atol=1e-5)


@pytest.mark.parametrize("everything", [False, True])
def test_weight_decay_of_matrices_only_or_of_everything(everything):
    model = timm.create_model("cbt_pico_patch1_8", embed_dim=16, depth=1, num_heads=2)
    optimizer = make_optimizer(model, OptimConfig(name="adamw", weight_decay=0.1, decay_everything=everything))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        assert (id(parameter) in decayed) == (everything or matrix), name


def test_the_learning_rate_falls_as_a_power():
    config = OptimConfig(lr=3e-3, epochs=2, warmup_epochs=0, schedule="poly")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.lr)
    scheduler = make_scheduler(optimizer, config, 10)
    assert isinstance(scheduler, PolyLRScheduler)
    for step in (0, 7, 19):
        scheduler.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(config.lr * (1 - step / 20) ** 0.9)
