"""Sets of features that are streamed: what the model makes of them in memory."""

import h5py
import numpy as np
import pytest
import torch

from cbsa_torch import CBSA
from cbsa_torch.interpret import capture, token_attention
from cbsa_torch.models import TokenSetTransformer
from cbsa_torch.nn import MSSA, TSSA, AgentAttention, LinearCBSA
from cbsa_torch.streaming import StreamError, plan, stream
from tests.helpers.memory import Largest
from tests.helpers.streaming import shaken

ALL = ("logits", "map", "features")
WIDTH = 11

MODELS = {
    "relative": {"num_representatives": 9},
    "certified": {"step": "certified", "num_representatives": 6, "positions": "fourier"},
    "exact, few cells": {"contraction": "exact", "eps": 1.0, "num_representatives": (2, 3)},
    "certified, one place": {"step": "certified", "num_representatives": 4, "coord_dim": 1},
    "as many as tokens": {"num_representatives": 500},
    "learned, no places": {"representatives": "learned", "num_representatives": 7, "positions": "none"},
    "agent": {"mixer": AgentAttention, "num_representatives": 8, "coord_dim": 3},
    "linear": {"mixer": LinearCBSA},
    "tost, mlp": {"mixer": TSSA, "mlp_ratio": 2.0},
}


def model_of(dtype=torch.float64, **options):
    torch.manual_seed(1)
    options = {"dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3, **options}
    return shaken(TokenSetTransformer(WIDTH, dtype=dtype, **options))


def drawn(n=130, axes=2):
    """Features, and places of which some are shared and some far off."""
    rng = np.random.default_rng(n)
    coords = rng.integers(0, 40, (n, axes)) * 256
    coords[5] = 30_000
    return rng.standard_normal((n, WIDTH)).astype(np.float32), coords


@torch.no_grad()
def in_memory(model, features, coords):
    """Logits, the map of layer 1, and features."""
    x = torch.from_numpy(features)[None].to(model.cls_token.dtype)
    given = () if coords is None else (torch.from_numpy(coords)[None],)
    with capture(model, layers=[1]) as records:
        logits = model(x, *given)
    (record,) = records.values()
    return {
        "logits": logits,
        "map": token_attention(record)[0],
        "features": model.forward_features(x, *given)[0, 1:],
    }


def assert_equal(found, expected, tolerance):
    for key, value in expected.items():
        streamed = torch.from_numpy(np.load(found.files[key]))
        assert streamed.shape == value.shape, key
        assert (streamed - value).abs().max() < tolerance * value.abs().max(), key


@pytest.mark.parametrize("name", MODELS)
def test_a_stream_makes_what_the_model_makes(name, tmp_path, monkeypatch):
    model = model_of(**MODELS[name])
    features, coords = drawn(axes=model.coord_dim)
    coords = coords if model.needs_coords else None
    expected = in_memory(model, features, coords)
    for chunk in (7, 8192):
        monkeypatch.setattr(plan, "CHUNK", chunk)
        given = {"coords": coords, "results": ALL, "layer": 1}
        result = stream(model, features, tmp_path / str(chunk), **given)
        assert result.grid_size == (130,)
        assert ("picture" in result.files) == (coords is not None and model.coord_dim == 2)
        assert_equal(result, expected, 1e-12)


def test_files_of_slides_in_float32_and_half(tmp_path, monkeypatch):
    """Features in half, as encoders write them, with an axis of one slide; coordinates in float32."""
    monkeypatch.setattr(plan, "CHUNK", 50)
    model, (features, coords) = model_of(torch.float32, num_representatives=9), drawn()
    features, coords = features.astype(np.float16), coords.astype(np.float32)
    with h5py.File(tmp_path / "slide.h5", "w") as file:
        file["features"], file["coords"] = features[None], coords[None]
        result = stream(model, file["features"], tmp_path / "out", coords=file["coords"], results=ALL, layer=1)
    assert_equal(result, in_memory(model, features.astype(np.float32), coords), 1e-5)


def test_no_tensor_is_larger_than_the_budget(tmp_path):
    """And with a larger one some are: it is used."""
    model, (features, coords) = model_of(num_representatives=9), drawn(5000)
    found = {}
    for memory in (10**6, 10**8):
        with Largest() as largest:
            stream(model, features, tmp_path / str(memory), coords=coords, results=ALL, memory=memory)
        found[memory] = largest.elements * 8
    assert found[10**6] < 10**6 < found[10**8] < 10**8


class InterruptError(Exception):
    pass


def test_interrupted_in_every_sweep_it_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 20)
    model, (features, coords) = model_of(num_representatives=9), drawn()
    given = {"coords": coords, "results": ALL, "layer": 0}
    expected = stream(model, features, tmp_path / "whole", **given)
    finished = []

    def interrupt(done, total, name):
        if name not in finished:
            finished.append(name)
            raise InterruptError

    for _ in range(5):  # embed, and two sweeps of each of two layers
        with pytest.raises(InterruptError):
            stream(model, features, tmp_path / "out", progress=interrupt, **given)
    found = stream(model, features, tmp_path / "out", **given)
    for name in ALL:
        assert found.files[name].read_bytes() == expected.files[name].read_bytes()


def test_what_changed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 20)
    model, (features, coords) = model_of(num_representatives=9), drawn()

    def move(done, total, name):
        coords[-1] += 1

    with pytest.raises(StreamError, match="the set changed while it was read"):
        stream(model, features, tmp_path / "out", coords=coords, progress=move)
    with pytest.raises(StreamError, match="begun with another set"):
        stream(model, features, tmp_path / "out", coords=coords)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"coords": None}, ValueError, r"coords must be given to this model \(positions='sincos'\)"),
        ({"coords": np.zeros((5, 2))}, ValueError, r"coords must have shape \(130, 2\)"),
        ({"coords": np.full((130, 2), np.nan)}, ValueError, "coords must be finite"),
        ({"coords": np.full((130, 2), 2**63, np.uint64)}, ValueError, r"coords must be below 2\^63"),
        ({"coords": np.zeros((130, 2), bool)}, TypeError, "coords must hold integers or floating-point"),
        ({"mean": (0.5,)}, ValueError, "channels, mean and std are of images"),
        ({"memory": 10_000}, ValueError, "memory must be at least 24960 bytes for the coordinates"),
        ({"memory": 25_000}, ValueError, "memory must be at least [0-9]+ bytes for 16 tokens"),
        ({"results": ["labels"]}, ValueError, "labels need a Segmenter"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(given, error, message, tmp_path):
    features, coords = drawn()
    with pytest.raises(error, match=message):
        stream(model_of(num_representatives=64), features, tmp_path / "out", **{"coords": coords, **given})
    assert not (tmp_path / "out").exists()


def test_other_sources_and_mixers_are_refused(tmp_path):
    features, coords = drawn()
    with pytest.raises(ValueError, match=r"source must have shape \(N, in_dim\) with the model's in_dim 11"):
        stream(model_of(), features[:, :4], tmp_path / "out", coords=coords)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn is MSSA, which compares every token"):
        stream(model_of(mixer=MSSA), features, tmp_path / "out", coords=coords)
    official = model_of(mixer=CBSA, layout="official")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: coords need layout='standard'"):
        stream(official, features, tmp_path / "out", coords=coords)
