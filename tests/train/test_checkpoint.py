from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cbsa_torch.models import load_checkpoint, load_official, read_tensors, save_checkpoint
from cbsa_torch.models.checkpoint import CheckpointError, load_strictly, write_atomically
from cbsa_torch.models.convert import convert_official
from cbsa_torch.train.run.state import MAGIC, load_state, random_states, restore_random_states, save_state

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


class Trap:
    """Unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def flip_bit(path: Path, share: float, bit: int = 0) -> None:
    """Change one bit of a file, at a share of its length."""
    data = bytearray(path.read_bytes())
    data[min(int(share * len(data)), len(data) - 1)] ^= 1 << bit
    path.write_bytes(data)


# ---- our files


def test_a_model_reads_back_equal(saved):
    model, found = load_checkpoint(saved)
    images = torch.randn(2, 1, 8, 8)
    assert not model.training
    assert found == info()
    torch.testing.assert_close(model(images), tiny()(images), atol=0, rtol=0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.safetensors"):
        load_checkpoint(tmp_path / "none.safetensors")


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


def test_a_file_of_an_unknown_model_is_refused(tmp_path, monkeypatch):
    info = {"model": "cbt_unheard_of", "model_args": {}}
    with pytest.raises(CheckpointError, match="not a model of timm"):
        save_checkpoint(tmp_path / "m.safetensors", tiny(), info)
    monkeypatch.setattr("cbsa_torch.models.checkpoint.timm.is_model", lambda name: True)
    save_checkpoint(tmp_path / "m.safetensors", tiny(), info)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="holds 'cbt_unheard_of', which is not a model of timm here"):
        load_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth": 3}, r"missing blocks\.2\."),
        ({"depth": 1}, r"unexpected blocks\.1\."),
        ({"num_classes": 7}, r"head\.weight has shape \(10, 16\), the model needs \(7, 16\)"),
    ],
)
def test_a_file_of_another_model_names_what_does_not_fit(tmp_path, changed, message):
    save_checkpoint(tmp_path / "m.safetensors", tiny(), info(**changed))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "m.safetensors")


def test_loading_strictly_changes_nothing_when_it_fails():
    model = tiny()
    tensors = {k: v + 1 for k, v in model.state_dict().items()}
    del tensors["head.bias"]
    with pytest.raises(CheckpointError, match=r"here does not fit the model: missing head\.bias"):
        load_strictly(model, tensors, "here")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny().parameters(), strict=True))


def test_many_misfits_are_counted():
    with pytest.raises(CheckpointError, match=r"; and \d+ more"):
        load_strictly(tiny(), {}, "here")


# ---- PyTorch files


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


@pytest.mark.parametrize("keep", [0, 1, 100, -300])
def test_a_truncated_pytorch_file_is_refused(tmp_path, keep):
    path = tmp_path / "model.pth"
    torch.save(tiny().state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        read_tensors(path)


@pytest.mark.parametrize(
    "content", [b"plain text", b"text", b"\x80\x02", b"\x00" * 64, b"\xff" * 64, b"(lp0\n.", b"N."]
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
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


@pytest.mark.parametrize("name", ["model.txt", "model", "model.h5"])
def test_another_suffix_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"must be a \.safetensors file or a PyTorch file \(\.pth"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_a_missing_checkpoint_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        read_tensors(tmp_path / name)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path)


# ---- atomic writing


def test_writing_creates_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch, owner, name):
    def fail(*args):
        raise OSError("no space left on device")

    before = saved.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(saved, tiny(num_classes=3), info(num_classes=3))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    before = saved.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_state(saved, {"a": 1})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


# ---- the trainer's state


def test_a_state_reads_back(tmp_path):
    state = {"progress": {"epoch": 3}, "model": {"w": torch.arange(3)}, "ema": None}
    save_state(tmp_path / "last.pt", state)
    found = load_state(tmp_path / "last.pt")
    assert torch.equal(found["model"]["w"], torch.arange(3))
    assert (found["progress"], found["ema"]) == ({"epoch": 3}, None)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 torn", b"\x80\x02", b"\xff" * 64, b"(lp0\n."])
def test_what_is_no_state_is_refused(tmp_path, content):
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt is not a trainer state"):
        load_state(tmp_path / "last.pt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_state_is_refused(tmp_path, share):
    path = tmp_path / "last.pt"
    save_state(path, {"model": tiny().state_dict()})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"last\.pt is truncated or altered"):
        load_state(path)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_one_flipped_bit_of_a_state_is_found(tmp_path, share):
    path = tmp_path / "last.pt"
    save_state(path, {"model": tiny().state_dict()})
    flip_bit(path, share)
    with pytest.raises(CheckpointError, match=r"last\.pt is (not a trainer state|truncated or altered)"):
        load_state(path)


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


def test_a_missing_state_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"last\.pt"):
        load_state(tmp_path / "last.pt")


def test_a_malicious_state_is_refused_unexecuted(tmp_path):
    path, victim = tmp_path / "last.pt", tmp_path / "created"
    torch.save({"progress": Trap(victim)}, path)
    pickled = path.read_bytes()
    with pytest.raises(CheckpointError, match="is not a trainer state"):
        load_state(path)
    # An attacker knows how checksums are made.
    path.write_bytes(MAGIC + hashlib.sha256(pickled).hexdigest().encode() + pickled)
    with pytest.raises(CheckpointError, match="holds no trainer state: Weights only load failed"):
        load_state(path)
    assert not victim.exists()


def test_random_states_read_back_from_a_file(tmp_path):
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    draw()
    save_state(tmp_path / "last.pt", {"random": random_states()})
    expected = draw()
    restore_random_states(load_state(tmp_path / "last.pt")["random"])
    assert draw() == expected


# ---- official checkpoints

TO_OFFICIAL = {
    r"pos_embed": "pos_embedding",
    r"cls_token": "cls_token",
    r"stem\.(proj\..*)": r"to_patch_embedding.\1",
    r"norm\.(weight|bias)": r"mlp_head.0.\1",
    r"head\.(weight|bias)": r"mlp_head.1.\1",
    r"blocks\.(\d+)\.norm1\.(weight|bias)": r"transformer.layers.\1.0.norm.\2",
    r"blocks\.(\d+)\.norm2\.(weight|bias)": r"transformer.layers.\1.1.norm.\2",
    r"blocks\.(\d+)\.ista\.weight": r"transformer.layers.\1.1.fn.weight",
    r"blocks\.(\d+)\.attn\.step_tokens": r"transformer.layers.\1.0.fn.step_x",
    r"blocks\.(\d+)\.attn\.step_representatives": r"transformer.layers.\1.0.fn.step_rep",
    r"blocks\.(\d+)\.attn\.qkv\.weight": r"transformer.layers.\1.0.fn.proj.weight",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"transformer.layers.\1.0.fn.to_out.\2",
}


def official_model():
    torch.manual_seed(0)
    arguments = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("cbt_tiny_patch16_224", **arguments, layout="official").eval()


def official_state(model) -> dict[str, Tensor]:
    """The state dict of a model under the names and shapes of the official code."""
    state = {}
    for key, tensor in model.state_dict().items():
        (name,) = [m.expand(new) for old, new in TO_OFFICIAL.items() if (m := re.fullmatch(old, key))]
        state[name] = tensor.reshape(-1, 1, 1) if ".step_" in key else tensor
    return state


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors"])
def test_an_official_checkpoint_converts(tmp_path, prefix, wrapped, suffix):
    model = official_model()
    state = {prefix + k: v for k, v in official_state(model).items()}
    source, output = tmp_path / f"official{suffix}", tmp_path / "ours.safetensors"
    if suffix == ".safetensors":
        save_file(state, source)
    else:
        torch.save({"state_dict": state, "epoch": 9, "best_acc1": 0.5} if wrapped else state, source)
    described = convert_official(source, output)
    converted, found = load_checkpoint(output)
    assert found == described
    assert found["model_args"]["img_size"] == 64
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(converted(images), model(images), atol=0, rtol=0)


def test_an_official_state_dict_loads_directly():
    model = official_model()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(load_official(official_state(model))(images), model(images), atol=0, rtol=0)


def test_an_official_checkpoint_with_a_missing_key_names_it():
    state = official_state(official_model())
    del state["transformer.layers.1.0.fn.to_out.bias"]
    with pytest.raises(
        CheckpointError, match=r"missing transformer\.layers\.1\.0\.fn\.to_out\.bias; unexpected nothing"
    ):
        load_official(state)


def test_an_official_checkpoint_with_an_unexpected_key_names_it():
    state = official_state(official_model()) | {"surprise": torch.ones(1)}
    with pytest.raises(CheckpointError, match="unexpected surprise"):
        load_official(state)


def test_another_models_checkpoint_is_not_an_official_one(saved):
    with pytest.raises(CheckpointError, match="is not an official checkpoint: missing pos_embedding"):
        load_official(saved)


def test_a_failed_conversion_writes_nothing(saved, tmp_path):
    with pytest.raises(CheckpointError):
        convert_official(saved, tmp_path / "ours.safetensors")
    assert not (tmp_path / "ours.safetensors").exists()


def test_a_description_is_json(saved):
    with safe_open(saved, framework="pt") as file:
        assert json.loads(file.metadata()["cbsa_torch"]) == info()


@pytest.mark.parametrize("args", [{"checkpoint_path": "/etc/passwd"}, {"pretrained": True}])
def test_a_file_may_not_make_us_fetch_others(tmp_path, monkeypatch, args):
    info = {"model": "cbt_pico_patch1_8", "model_args": args}
    with pytest.raises(CheckpointError, match="model_args that are not allowed"):
        save_checkpoint(tmp_path / "m.safetensors", tiny(), info)
    with pytest.raises(CheckpointError, match="not a model of timm"):
        save_checkpoint(tmp_path / "m.safetensors", tiny(), {"model": "hf-hub:a/b", "model_args": {}})
    with pytest.raises(CheckpointError, match="does not say which model"):
        save_checkpoint(tmp_path / "m.safetensors", tiny(), {})


def test_an_official_checkpoint_with_our_names_or_wrong_dtypes_is_refused():
    state = official_state(official_model())
    with pytest.raises(CheckpointError, match="unexpected norm.weight"):
        load_official({**state, "norm.weight": torch.ones(16)})
    key = "transformer.layers.0.1.fn.weight"
    with pytest.raises(CheckpointError, match="ista.weight is torch.int64"):
        load_official({**state, key: state[key].long()})
    with pytest.raises(CheckpointError, match="layers"):
        load_official({**state, "transformer.layers.400.0.norm.weight": torch.ones(16)})
    with pytest.raises(CheckpointError, match="step_x .* instead of"):
        load_official({**state, "transformer.layers.0.0.fn.step_x": torch.ones(0, 1, 1)})
    compiled = {f"_orig_mod.{key}": value for key, value in state.items()}
    assert load_official(compiled).num_classes == load_official(state).num_classes


def test_a_checkpoint_has_the_suffix_it_is_read_by(tmp_path):
    model = timm.create_model("cbt_pico_patch1_8")
    with pytest.raises(CheckpointError, match=r"a checkpoint is a \.safetensors file, got .*x\.bin"):
        save_checkpoint(tmp_path / "x.bin", model, {"model": "cbt_pico_patch1_8", "model_args": {}})


def test_a_model_with_orthogonal_bases_comes_back(tmp_path):
    args = {"orthogonal": True, "tied": True, "contraction": "exact"}
    model = timm.create_model("cbt_pico_patch1_8", **args).eval()
    save_checkpoint(tmp_path / "x.safetensors", model, {"model": "cbt_pico_patch1_8", "model_args": args})
    again, _ = load_checkpoint(tmp_path / "x.safetensors")
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(images), model(images))
