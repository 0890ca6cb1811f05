"""Streams: what they make is what the model makes in memory, however they are cut and interrupted."""

import errno
import itertools
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cbsa_torch import CBSA
from cbsa_torch.interpret import capture, cls_attention_maps
from cbsa_torch.nn import MHSA, MSSA, TSSA, WhiteBoxBlock
from cbsa_torch.streaming import StreamError, files, picture, plan, run, stream, sweeps
from tests.helpers.memory import Largest
from tests.helpers.streaming import MEAN, MIXERS, STD, as_batch, classifier, image, segmenter

NORMAL = {"mean": MEAN, "std": STD}
ALL = ("logits", "map", "features")


def largest_error(found, expected):
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def arrays(result):
    return {name: np.load(path) for name, path in result.files.items() if name != "picture"}


@torch.no_grad()
def in_memory(model, pixels, dtype=torch.float64):
    """Logits, the map of layer 1, and features."""
    x = as_batch(pixels, dtype)
    with capture(model, layers=[1]) as records:
        logits = model(x)
    (record,) = records.values()
    features = model.forward_features(x)[0, 1:]
    return {"logits": logits, "map": cls_attention_maps(record)[0], "features": features}


# ---- equal to memory


@pytest.mark.parametrize("name", MIXERS)
def test_a_stream_makes_what_the_model_makes(name, tmp_path, monkeypatch):
    """At odd sizes, for chunks that end within rows, and one that holds all; the grid is not the model's."""
    model, pixels = classifier(MIXERS[name]), image(39, 53)
    expected = in_memory(model, pixels)
    for chunk in (23, 8192):
        monkeypatch.setattr(plan, "CHUNK", chunk)
        result = stream(model, pixels, tmp_path / str(chunk), results=ALL, layer=1, **NORMAL)
        assert result.grid_size == (10, 14)
        found = {key: torch.from_numpy(value) for key, value in arrays(result).items()}
        found["features"] = found["features"].flatten(0, 1)
        for key, value in expected.items():
            assert largest_error(found[key], value) < 1e-12, key
        assert largest_error(result.logits, expected["logits"]) < 1e-12


@pytest.mark.parametrize("name", ["pooled", "certified", "agent", "linear", "tost"])
def test_float32_agrees_to_1e_5(name, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 50)
    model, pixels = classifier(MIXERS[name], dtype=torch.float32), image(64, 72)
    expected = in_memory(model, pixels, torch.float32)
    found = arrays(stream(model, pixels, tmp_path / "out", results=ALL, layer=1, **NORMAL))
    for key, value in expected.items():
        assert largest_error(torch.from_numpy(found[key]).reshape(value.shape), value) < 1e-5, key


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((24, 24), {}),  # the model's own grid
        ((3, 61), {"global_pool": "max"}),  # less than a row of patches
        ((61, 3), {"global_pool": "avgmax"}),  # less than a column of them
        ((70, 9), {"global_pool": "avg", "patch_size": 8, "num_heads": 4}),  # positions are averaged
        ((40, 52), {"stem": "linear", "mlp_ratio": 2.0, "global_pool": "avgmax"}),
        ((11, 13), {"patch_size": 1, "global_pool": "avg"}),  # a halo on both sides
    ],
)
def test_sizes_stems_and_pools(size, options, tmp_path, monkeypatch):
    model, pixels = classifier(depth=2, **options), image(*size)
    with torch.no_grad():
        expected = model(as_batch(pixels))
    for chunk in (17, 100):
        monkeypatch.setattr(plan, "CHUNK", chunk)
        result = stream(model, pixels, tmp_path / str(chunk), **NORMAL)
        assert largest_error(result.logits, expected) < 1e-12


@pytest.mark.parametrize("mixer", ["cbsa", "agent", "tssa", "linear_cbsa"])
def test_labels_of_a_segmenter(mixer, tmp_path, monkeypatch):
    """Sizes that are no multiples of the patch; tiles of labels that end anywhere."""
    model, pixels = segmenter(mixer, learned_step=True), image(37, 50)
    with torch.no_grad():
        expected = model(as_batch(pixels)).argmax(1)[0].numpy()
        features = model.forward_features(as_batch(pixels))[0].permute(1, 2, 0)
    assert len(np.unique(expected)) > 2
    for chunk, tile in ((20, 1), (47, 4), (8192, 32)):
        monkeypatch.setattr(plan, "CHUNK", chunk)
        monkeypatch.setattr(sweeps, "TILE", tile)
        found = arrays(stream(model, pixels, tmp_path / str(chunk), results=["labels", "features"], **NORMAL))
        assert found["labels"].dtype == np.uint8
        np.testing.assert_array_equal(found["labels"], expected)
        assert largest_error(torch.from_numpy(found["features"]), features) < 1e-12


def test_a_map_alone_goes_no_further_than_its_layer(tmp_path):
    model, pixels, names = classifier(), image(20, 20), []
    options = {"results": ["map"], "layer": 0, **NORMAL}
    result = stream(model, pixels, tmp_path / "out", **options, progress=lambda *told: names.append(told[2]))
    assert dict.fromkeys(names) == dict.fromkeys(["embed", "layer 1 of 1: gather", "layer 1 of 1: update"])
    with capture(model, layers=[0]) as records, torch.no_grad():
        model(as_batch(pixels))
    (record,) = records.values()
    assert largest_error(torch.from_numpy(arrays(result)["map"]), cls_attention_maps(record)[0]) < 1e-12
    assert result.files["picture"].exists()


def test_bfloat16_scratch_is_half_as_large_and_close(tmp_path):
    model, pixels = classifier(dtype=torch.float32), image(64, 64)
    full = stream(model, pixels, tmp_path / "full", **NORMAL)
    half = stream(model, pixels, tmp_path / "half", scratch_dtype=torch.bfloat16, **NORMAL)
    assert 2 * half.scratch_bytes == full.scratch_bytes == 2 * 257 * 16 * 4
    assert 0 < largest_error(half.logits, full.logits) < 0.1


def test_hooks_and_autocast_act_as_in_memory(tmp_path, monkeypatch):
    """Also hooks that are not linear, and those on modules that only pass tokens on; autocast does not act."""
    monkeypatch.setattr(plan, "CHUNK", 20)
    model, pixels = classifier(), image(20, 28)
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: out.relu())
    model.blocks[1].attn.proj_drop.register_forward_hook(lambda module, args, out: 2 * out)
    model.pos_drop.register_forward_hook(lambda module, args, out: 2 * out)
    with torch.autocast("cpu", torch.bfloat16):
        result = stream(model, pixels, tmp_path / "out", **NORMAL)
    with torch.no_grad():
        assert largest_error(result.logits, model(as_batch(pixels))) < 1e-12


# ---- repeated and continued


class InterruptError(Exception):
    pass


def interrupted(model, pixels, folder, sweep, **options):
    """Stream, but raise in the middle of a sweep."""
    sweeps = []

    def progress(done, total, name):
        sweeps.append(name)
        if len(dict.fromkeys(sweeps)) == sweep + 1 and sweeps.count(name) == 2:
            raise InterruptError

    return stream(model, pixels, folder, progress=progress, **options)


@pytest.mark.parametrize("kind", ["classifier", "segmenter"])
def test_what_was_interrupted_goes_on_to_the_same_bits(kind, tmp_path, monkeypatch):
    """In the middle of every sweep in turn, in one stream, which does no finished sweep again."""
    monkeypatch.setattr(plan, "CHUNK", 20)
    monkeypatch.setattr(sweeps, "TILE", 3)
    pixels = image(37, 50)
    if kind == "classifier":
        model, options = classifier(global_pool="avgmax"), {"results": ALL, "layer": 1, **NORMAL}
    else:
        model, options = segmenter(), {"results": ("labels", "map"), **NORMAL}
    expected = arrays(stream(model, pixels, tmp_path / "whole", **options))
    again = arrays(stream(model, pixels, tmp_path / "again", **options))
    interrupts = 0
    for _ in itertools.count():
        try:  # each call finishes one sweep and is interrupted in the next
            result = interrupted(model, pixels, tmp_path / "out", 1 if interrupts else 0, **options)
        except InterruptError:
            interrupts += 1
            continue
        break
    assert interrupts == (7 if kind == "classifier" else 10)
    for key, value in expected.items():
        assert arrays(result)[key].tobytes() == again[key].tobytes() == value.tobytes(), key
    assert not (tmp_path / "out" / "scratch").exists()
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()).count(".part") == 0


def test_a_finished_stream_is_not_done_again(tmp_path):
    model, pixels = classifier(), image(20, 20)
    first = stream(model, pixels, tmp_path / "out", **NORMAL)
    second = stream(model, pixels, tmp_path / "out", **NORMAL, progress=lambda *_: pytest.fail("it computes"))
    assert torch.equal(first.logits, second.logits)
    with pytest.raises(StreamError, match="results of another image"):
        stream(model, 255 - pixels, tmp_path / "out", **NORMAL)
    first.files["logits"].unlink()
    with pytest.raises(StreamError, match=r"logits\.npy was made and is gone"):
        stream(model, pixels, tmp_path / "out", **NORMAL)


def test_what_a_stream_leaves_that_is_killed_at_its_end_is_removed(tmp_path, monkeypatch):
    model, pixels = classifier(), image(20, 20)

    def remove(*_):
        raise InterruptError

    with monkeypatch.context() as patch, pytest.raises(InterruptError):
        patch.setattr(run.State, "remove", remove)
        stream(model, pixels, tmp_path / "out", **NORMAL)
    assert (tmp_path / "out" / "scratch").exists()
    stream(model, pixels, tmp_path / "out", **NORMAL, progress=lambda *_: pytest.fail("it computes"))
    assert not (tmp_path / "out" / "scratch").exists()


def _stream_slowly(folder):
    torch.set_num_threads(1)  # a forked process has no other threads
    plan.CHUNK = 20
    stream(classifier(), image(64, 64), folder, **NORMAL, progress=lambda *_: time.sleep(0.002))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked: a new one would import for long")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_it_goes_on(tmp_path, monkeypatch):
    """By a signal that nobody can catch, after at least one sweep is on the disk."""
    pid = os.fork()
    if pid == 0:
        try:
            _stream_slowly(tmp_path / "out")
        finally:
            os._exit(0)
    tokens = tmp_path / "out" / "scratch" / "tokens-1.bin"
    deadline = time.monotonic() + 30
    while not (tokens.exists() and tokens.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    monkeypatch.setattr(plan, "CHUNK", 20)
    names = []
    result = stream(
        classifier(), image(64, 64), tmp_path / "out", **NORMAL, progress=lambda *told: names.append(told[2])
    )
    assert "embed" not in names
    expected = stream(classifier(), image(64, 64), tmp_path / "whole", **NORMAL)
    assert torch.equal(result.logits, expected.logits)


def test_another_budget_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    model, pixels = classifier(), image(37, 50)
    monkeypatch.setattr(plan, "CHUNK", 20)
    with pytest.raises(InterruptError):
        interrupted(model, pixels, tmp_path / "out", 3, **NORMAL)
    monkeypatch.setattr(plan, "CHUNK", 35)
    result = stream(model, pixels, tmp_path / "out", memory="5MB", **NORMAL)
    with torch.no_grad():
        assert largest_error(result.logits, model(as_batch(pixels))) < 1e-12


def cut(model, pixels, folder, scratch, sweep=4):
    with pytest.raises(InterruptError):
        interrupted(model, pixels, folder, sweep, scratch=scratch, results=("logits", "map"), layer=0, **NORMAL)


def test_results_are_those_of_one_stream_wherever_its_scratch_is(tmp_path, monkeypatch):
    """A stream does not go on in another folder, nor where another one was begun since or is at work."""
    monkeypatch.setattr(plan, "CHUNK", 20)
    model, pixels = classifier(), image(37, 50)
    one, other, scratch = tmp_path / "one", tmp_path / "other", tmp_path / "scratch"
    given = {"results": ("logits", "map"), "layer": 0, **NORMAL}
    expected = arrays(stream(model, pixels, tmp_path / "whole", **given))
    cut(model, pixels, one, scratch)
    assert (one / "map.npy").exists()
    with pytest.raises(StreamError, match="are of a stream into another folder than .*other"):
        stream(model, pixels, other, scratch=scratch, **given)
    with pytest.raises(StreamError, match=r"map\.npy is there already"):
        stream(model, pixels, one, scratch=tmp_path / "scratch2", **given)
    found = arrays(stream(model, pixels, one, scratch=scratch, **given))
    for key, value in expected.items():
        assert found[key].tobytes() == value.tobytes(), key
    assert sorted(path.name for path in one.iterdir()) == ["logits.npy", "map.npy", "map.png", "result.json"]

    cut(model, pixels, other, tmp_path / "first", sweep=1)
    cut(classifier(TSSA), pixels, other, tmp_path / "second", sweep=1)
    with pytest.raises(StreamError, match="or one that was begun there later"):
        stream(model, pixels, other, scratch=tmp_path / "first", **given)

    def begin_another(*_):
        for place in ({"folder": tmp_path / "busy"}, {"folder": tmp_path / "new", "scratch": tmp_path / "a"}):
            with pytest.raises(StreamError, match="another stream writes to"):
                stream(model, pixels, **{"scratch": tmp_path / "b", **place}, **given)
        raise InterruptError

    with pytest.raises(InterruptError):
        stream(model, pixels, tmp_path / "busy", scratch=tmp_path / "a", progress=begin_another, **given)


# ---- refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [("model", "begun with another model"), ("image", "another image"), ("layer", "another option")],
)
def test_what_changed_between_two_calls_is_refused(changed, message, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 20)
    model, pixels, options = classifier(), image(37, 50), {"results": ALL, "layer": 1, **NORMAL}
    with pytest.raises(InterruptError):
        interrupted(model, pixels, tmp_path / "out", 2, **options)
    if changed == "model":
        with torch.no_grad():
            model.blocks[2].attn.step_tokens[0] += 1e-6
    elif changed == "image":
        pixels[-1, -1] += 1
    else:
        options["layer"] = 0
    with pytest.raises(StreamError, match=message):
        stream(model, pixels, tmp_path / "out", **options)


def test_an_image_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 20)
    pixels = image(37, 50)

    def change(*_):
        pixels[0, 0] += 1

    with pytest.raises(StreamError, match="changed while it was read"):
        stream(classifier(), pixels, tmp_path / "out", **NORMAL, progress=change)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (MSSA, r"blocks\.0\.attn is MSSA, which compares every token"),
        (MHSA, r"blocks\.0\.attn is MHSA"),
        (lambda *a, **k: CBSA(*a, representatives="tokens", **k), r"blocks\.0\.attn: CBSA with .* AllTokens"),
    ],
)
def test_a_mixer_that_needs_all_at_once_is_refused_before_anything_is_read(mixer, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        stream(classifier(mixer), image(20, 20), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hooks_and_training_mode_are_refused(tmp_path):
    model, pixels = classifier(), image(20, 20)
    handle = model.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks\.1 cannot be streamed: it has hooks"):
        stream(model, pixels, tmp_path / "out")
    handle.remove()
    with pytest.raises(ValueError, match="evaluation mode"):
        stream(model.train(), pixels, tmp_path / "out")
    with pytest.raises(TypeError, match="must be a WhiteBoxTransformer, .* got Linear"):
        stream(torch.nn.Linear(2, 2), pixels, tmp_path / "out")


class OtherBlock(WhiteBoxBlock):
    pass


def test_parts_that_were_replaced_by_others_are_refused(tmp_path):
    """They may need all tokens or pixels at once, or are passed by."""
    block = classifier()
    block.blocks[1].__class__ = OtherBlock
    first_guess = classifier()
    first_guess.blocks[0].attn.representatives.register_forward_hook(lambda *_: None)
    grouped, own = classifier(), classifier()
    grouped.stem.proj[0][1] = torch.nn.GroupNorm(2, grouped.stem.proj[0][0].out_channels)
    norm = own.stem.proj[0][1]
    own.stem.proj[0][1] = torch.nn.BatchNorm2d(norm.num_features, track_running_stats=False)
    for model, message in (
        (block, r"blocks\.1 is OtherBlock, which cannot be streamed"),
        (first_guess, r"blocks\.0\.attn cannot be streamed: of PooledRepresentatives it has hooks"),
        (grouped, r"convolutions 3 x 3 with batch norms, and GELU, to be computed by rows; proj\.0"),
        (own, "batch norms with running statistics"),
    ):
        with pytest.raises(ValueError, match=message):
            stream(model.eval(), image(20, 20), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": (0.5, 0.0, 0.5)}, "std must be finite and positive"),
        ({"results": ["labels"]}, "labels need a Segmenter"),
        ({"results": []}, "at least one"),
        ({"results": ["mask"]}, "mask"),
        ({"layer": 3, "results": ["map"]}, "layer must be one of 3"),
        ({"memory": 2000}, "memory must be at least [0-9]+ bytes for 16 tokens"),
        ({"memory": "some"}, "memory must be a number of bytes or a text"),
        ({"mean": (0.5,)}, "mean must have one number for each of 3"),
    ],
)
def test_options_that_cannot_be(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        stream(classifier(TSSA), image(20, 20), tmp_path / "out", **options)


def test_a_disk_that_fills_up_at_any_file_is_told_and_it_goes_on(tmp_path, monkeypatch):
    """Tokens, results, the state, the picture, the record at the end: each once."""
    model, pixels = classifier(), image(20, 20)
    options = {"results": ("logits", "map"), **NORMAL}
    expected = arrays(stream(model, pixels, tmp_path / "whole", **options))
    failed = set()

    def full(place, original):
        def write(*args, **kwargs):
            if place not in failed:
                failed.add(place)
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        return write

    with monkeypatch.context() as patch:
        for owner, name in (
            (files.Rows, "write"),
            (files.ArrayFile, "write"),
            (files, "write_atomically"),
            (picture, "write_atomically"),
            (run, "write_atomically"),
        ):
            patch.setattr(owner, name, full((owner, name), getattr(owner, name)))
        for _ in range(5):
            with pytest.raises(StreamError, match="the disk is full at .*: make room and call again"):
                stream(model, pixels, tmp_path / "out", **options)
        result = stream(model, pixels, tmp_path / "out", **options)
    for key, value in expected.items():
        assert arrays(result)[key].tobytes() == value.tobytes(), key


def test_a_disk_without_room_is_told_before_anything_is_embedded(tmp_path, monkeypatch):
    model, pixels = classifier(), image(20, 20)
    with (
        monkeypatch.context() as patch,
        pytest.raises(StreamError, match=r"out needs .* GB, and its disk has"),
    ):
        patch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        stream(model, pixels, tmp_path / "out", **NORMAL, progress=lambda *_: pytest.fail("it computes"))
    assert not list((tmp_path / "out").rglob("*.bin"))
    stream(model, pixels, tmp_path / "out", **NORMAL)  # room was made


def test_a_model_without_a_head_gives_its_feature(tmp_path):
    model, pixels = classifier(), image(20, 20)
    model.reset_classifier(0)
    model.eval()
    result = stream(model, pixels, tmp_path / "out", **NORMAL)
    with torch.no_grad():
        assert largest_error(result.logits, model(as_batch(pixels))) < 1e-12


def test_results_of_others_are_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "logits.npy").write_bytes(b"mine")
    with pytest.raises(StreamError, match=r"logits\.npy is there already"):
        stream(classifier(), image(20, 20), tmp_path / "out")
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "map.png").write_bytes(b"mine")
    with pytest.raises(StreamError, match=r"map\.png is there already"):
        stream(classifier(), image(20, 20), tmp_path / "drawn", results=["map"])


# ---- within the budget


@pytest.mark.parametrize("kind", ["classifier", "segmenter"])
def test_no_tensor_is_larger_than_the_budget(kind, tmp_path):
    """And with a larger one some are: it is used."""
    model = classifier() if kind == "classifier" else segmenter()
    results = ("logits", "map", "features") if kind == "classifier" else ("labels", "map", "features")
    found = {}
    for memory in (2 * 10**6, 10**8):
        with Largest() as largest:
            stream(model, image(240, 200), tmp_path / str(memory), results=results, memory=memory, **NORMAL)
        found[memory] = largest.elements * 8
    assert found[2 * 10**6] < 2 * 10**6 < found[10**8] < 10**8
