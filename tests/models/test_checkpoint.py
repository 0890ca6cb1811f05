"""Weights files: ours read back whole or not at all, foreign ones as tensors only."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import timm
import timm.utils
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from cbsa_torch._core.files import write_atomically
from cbsa_torch.models import load_checkpoint, load_official, read_tensors, save_checkpoint
from cbsa_torch.models.checkpoint import CheckpointError, load_strictly
from tests.helpers.damage import Trap, flip_bit

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_representatives": 4}


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("cbt_pico_patch1_8", **{**TINY, **kwargs}).eval()


def info(**kwargs) -> dict:
    return {"model": "cbt_pico_patch1_8", "model_args": {**TINY, **kwargs}, "note": "x"}


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tiny(), info())
    return path


def test_a_model_reads_back_equal(saved):
    model, found = load_checkpoint(saved)
    images = torch.randn(2, 1, 8, 8)
    assert not model.training
    assert found == info()
    with safe_open(saved, framework="pt") as file:
        assert json.loads(file.metadata()["cbsa_torch"]) == info()
    torch.testing.assert_close(model(images), tiny()(images), atol=0, rtol=0)


def test_a_fixed_grid_of_representatives_is_kept(tmp_path):
    path, images = tmp_path / "model.safetensors", torch.randn(2, 1, 6, 12)
    fixed = tiny(num_representatives=(3, 3), img_size=(6, 12))
    save_checkpoint(path, fixed, info(num_representatives=(3, 3), img_size=(6, 12)))
    model, _ = load_checkpoint(path)
    assert model.blocks[0].attn.representatives.num_representatives == (3, 3)
    torch.testing.assert_close(model(images), fixed(images), atol=0, rtol=0)
    closest = tiny(num_representatives=9, img_size=(6, 12))
    assert not torch.allclose(closest(images), fixed(images))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is truncated or not a safetensors file"):
        load_checkpoint(saved)


def test_a_file_of_other_software_is_refused(tmp_path):
    save_file(tiny().state_dict(), tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="was not written by cbsa_torch"):
        load_checkpoint(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize("text", ["not json", "[]", '{"model": "cbt_pico_patch1_8"}'])
def test_a_file_with_a_strange_description_is_refused(tmp_path, text):
    save_file(tiny().state_dict(), tmp_path / "m.safetensors", metadata={"cbsa_torch": text})
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        load_checkpoint(tmp_path / "m.safetensors")


def test_a_file_of_an_unknown_model_is_refused(tmp_path):
    unknown = {"model": "cbt_unheard_of", "model_args": {}}
    with pytest.raises(CheckpointError, match="not a model of timm"):
        save_checkpoint(tmp_path / "m.safetensors", tiny(), unknown)
    write_described(tmp_path / "m.safetensors", unknown)
    with pytest.raises(CheckpointError, match="holds 'cbt_unheard_of', which is not a model of timm here"):
        load_checkpoint(tmp_path / "m.safetensors")


def write_described(path: Path, description: dict) -> None:
    """A file of other software that describes itself as ours do."""
    save_file(tiny().state_dict(), path, metadata={"cbsa_torch": json.dumps(description)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth": 3}, r"missing blocks\.2\."),
        ({"depth": 1}, r"unexpected blocks\.1\."),
        ({"num_classes": 7}, r"head\.weight has shape \(10, 16\), the model needs \(7, 16\)"),
        ({"depth": "many"}, "cannot build the model 'cbt_pico_patch1_8'"),
    ],
)
def test_weights_of_another_model_are_neither_written_nor_read(tmp_path, changed, message):
    path = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(path, tiny(), info(**changed))
    assert not path.exists()
    write_described(path, info(**changed))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


# ---- wrappers


def compiled_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    return model


def rechecked(model):
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    return model


WRAPPERS = {
    "compiled": torch.compile,
    "compiled blocks": compiled_blocks,
    "DataParallel": torch.nn.DataParallel,
    "DataParallel of compiled": lambda model: torch.nn.DataParallel(torch.compile(model)),
    "compiled DataParallel": lambda model: torch.compile(torch.nn.DataParallel(model)),
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compiled AveragedModel": lambda model: torch.compile(torch.optim.swa_utils.AveragedModel(model)),
    "ModelEmaV3": timm.utils.ModelEmaV3,
    "checkpointed": rechecked,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_written_by_its_own_names(tmp_path, wrap):
    path, state = tmp_path / "m.safetensors", tiny().state_dict()
    wrapped = wrap(tiny())
    save_checkpoint(path, wrapped, info())
    model, _ = load_checkpoint(path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.save(wrapped.state_dict(), tmp_path / "m.pth")
    assert read_tensors(tmp_path / "m.pth").keys() == state.keys()


def test_a_folder_whose_name_is_no_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    save_checkpoint(folder / "m.safetensors", tiny(), info())
    model, read = load_checkpoint(folder / "m.safetensors")
    assert read == info()
    assert all(map(torch.equal, model.state_dict().values(), tiny().state_dict().values()))


def test_tied_weights_are_written(tmp_path):
    model = tiny()
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    save_checkpoint(tmp_path / "m.safetensors", model, info())
    again = load_checkpoint(tmp_path / "m.safetensors")[0]
    assert torch.equal(again.blocks[1].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def wrapped_inside(model):
    model.blocks[0] = torch.nn.DataParallel(model.blocks[0])
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrapped_inside, r"missing blocks\.0\..*unexpected blocks\.0\.module\."),
        (
            lambda model: parametrizations.weight_norm(model.head) and model,
            r"unexpected head\.parametrizations",
        ),
        (lambda model: model.to("meta"), "tensors that are not dense, whole"),
    ],
)
def test_what_could_not_be_read_is_refused_before_writing(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "m.safetensors", change(tiny()), info())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_an_average_of_the_weights_comes_first(tmp_path, key):
    averaged = {f"module.{name}": value + 1 for name, value in tiny().state_dict().items()}
    torch.save(
        {"state_dict": tiny().state_dict(), "model": tiny().state_dict(), key: averaged}, tmp_path / "m.pth"
    )
    found = read_tensors(tmp_path / "m.pth")
    assert torch.equal(found["head.bias"], averaged["module.head.bias"])


def test_loading_strictly_changes_nothing_when_it_fails():
    model = tiny()
    tensors = {k: v + 1 for k, v in model.state_dict().items()}
    del tensors["head.bias"]
    with pytest.raises(CheckpointError, match=r"here does not fit the model: missing head\.bias"):
        load_strictly(model, tensors, "here")
    with pytest.raises(CheckpointError, match=r"; and \d+ more"):
        load_strictly(model, {}, "here")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny().parameters(), strict=True))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1), bit=st.integers(0, 7))
def test_one_flipped_bit_of_a_model_is_found(saved, share, bit):
    whole = saved.read_bytes()
    try:
        flip_bit(saved, share, bit)
        with pytest.raises(CheckpointError):
            load_checkpoint(saved)
    finally:
        saved.write_bytes(whole)


@pytest.mark.parametrize("args", [{"checkpoint_path": "/etc/passwd"}, {"pretrained": True}])
def test_what_could_not_be_loaded_or_would_fetch_is_not_written(tmp_path, args):
    with pytest.raises(CheckpointError, match="model_args that are not allowed"):
        save_checkpoint(tmp_path / "m.safetensors", tiny(), {"model": "cbt_pico_patch1_8", "model_args": args})
    with pytest.raises(CheckpointError, match="not a model of timm"):
        save_checkpoint(tmp_path / "m.safetensors", tiny(), {"model": "hf-hub:a/b", "model_args": {}})
    with pytest.raises(CheckpointError, match="does not say which model"):
        save_checkpoint(tmp_path / "m.safetensors", tiny(), {})
    with pytest.raises(CheckpointError, match=r"is a \.safetensors file, got .*x\.bin"):
        save_checkpoint(tmp_path / "x.bin", tiny(), info())


def test_a_model_with_orthogonal_bases_comes_back(tmp_path):
    args = {"orthogonal": True, "tied": True, "contraction": "exact"}
    model = timm.create_model("cbt_pico_patch1_8", **args).eval()
    save_checkpoint(tmp_path / "x.safetensors", model, {"model": "cbt_pico_patch1_8", "model_args": args})
    again, _ = load_checkpoint(tmp_path / "x.safetensors")
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".bin", ".ckpt"])
def test_state_dicts_are_found(tmp_path, wrap, prefix, suffix):
    state = tiny().state_dict()
    path = tmp_path / f"model{suffix}"
    torch.save(wrap({prefix + k: v for k, v in state.items()}), path)
    found = read_tensors(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) for k in state)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"w": t}, lambda t: {"state_dict": {"w": t}}])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_unexecuted(tmp_path, wrap, legacy):
    path, victim = tmp_path / "evil.pth", tmp_path / "created"
    if legacy:
        path.write_bytes(pickle.dumps(wrap(Trap(victim)), protocol=2))
    else:
        torch.save(wrap(Trap(victim)), path)
    with pytest.raises(CheckpointError, match=r"evil\.pth.*refused"):
        read_tensors(path)
    with pytest.raises(CheckpointError):
        load_official(path)
    assert not victim.exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "created")))
    assert (tmp_path / "created").exists()


@pytest.mark.parametrize(
    "content", [b"text", b"\x80\x02", b"\x00" * 64, b"\xff" * 64, b"(lp0\n.", b"N.", 0, 1, 100, -300]
)
def test_a_broken_pytorch_file_is_refused(tmp_path, content):
    """Other bytes, or so many of a right file."""
    path = tmp_path / "model.pth"
    torch.save(tiny().state_dict(), path)
    path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no state dict"),
        ([1, 2], "holds no state dict"),
        (torch.ones(2), "holds no state dict"),
        ({"epoch": 3, "lr": 0.1}, "entries that are not tensors: epoch, lr"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path / "model.pth")


def test_missing_files_and_other_suffixes_are_named(tmp_path):
    for name in ("none.pth", "none.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at .*{name}"):
            read_tensors(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path)
    for name in ("model.txt", "model"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"must be a \.safetensors file or a PyTorch file \(\.pth"):
            read_tensors(tmp_path / name)


def test_writing_creates_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")])
@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch, owner, name, error):
    def fail(*args):
        raise error

    before = saved.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(type(error)):
            save_checkpoint(saved, tiny(num_classes=3), info(num_classes=3))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
