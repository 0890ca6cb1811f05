"""``cbsa predict --stream``."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cbsa_torch.cli import main, streamed
from cbsa_torch.cli.predict import _PredictArgs
from cbsa_torch.streaming.sweeps import Sweeps
from cbsa_torch.train.data import InputSpec
from cbsa_torch.train.tasks.base import Trained
from cbsa_torch.train.tasks.segmentation import SegmentationTrainConfig
from cbsa_torch.train.tasks.segmentation.task import Segmentation
from tests.helpers.streaming import MEAN, STD, as_batch, image, segmenter


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large.npy"
    np.save(path, np.tile(load_digits().images[0] / 16, (3, 4)).astype(np.float32))
    return path


def test_it_classifies_and_writes_a_map(trained, large, tmp_path, capsys):
    output, folder = tmp_path / "predictions.json", tmp_path / "streamed"
    args = ["predict", "--checkpoint", str(trained), "--stream", str(large), "--memory", "50MB"]
    args += ["--stream-results", "map", "--stream-folder", str(folder), "--top", "2", "--output", str(output)]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "24 x 32 tokens" in out
    (row,) = json.loads(output.read_text())
    assert len(row["classes"]) == 2
    assert {"logits.npy", "map.npy", "map.png", "result.json"} == {path.name for path in folder.iterdir()}
    assert np.load(folder / "map.npy").shape == (2, 24, 32)
    assert main(args) == 0  # it is finished, and says the same
    assert json.loads(output.read_text()) == [row]


def test_interrupted_the_same_command_goes_on(trained, large, tmp_path, monkeypatch):
    """Ctrl-C in the third sweep: the first two are not done again, and the bits are those of an undisturbed run."""

    def run(folder):
        args = ["predict", "--checkpoint", str(trained), "--stream", str(large), "--memory", "50MB"]
        return main([*args, "--stream-results", "map", "--stream-folder", str(folder)])

    do, begun = Sweeps.do, []

    def interrupted(self, sweep):
        begun.append(sweep)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return do(self, sweep)

    assert run(tmp_path / "whole") == 0
    monkeypatch.setattr(Sweeps, "do", interrupted)
    assert run(tmp_path / "out") == 130
    assert run(tmp_path / "out") == 0
    assert begun[3] == begun[2]
    for name in ("logits.npy", "map.npy", "map.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_it_counts_the_labels_of_a_segmenter(tmp_path, monkeypatch):
    model, pixels, names = segmenter(), image(37, 50), list("abcdef")
    np.save(tmp_path / "image.npy", pixels)
    spec = InputSpec((3, 24, 24), MEAN, STD, "bicubic", 1.0)
    trained = Trained(model, spec, names, Segmentation(SegmentationTrainConfig()), {}, tmp_path)
    monkeypatch.chdir(tmp_path)
    options = _PredictArgs(stream="image.npy")
    prediction = streamed.predict(trained, "image.npy", options)
    with torch.no_grad():
        labels = model(as_batch(pixels)).argmax(1)
    values, counts = labels.unique(return_counts=True)
    expected = {names[int(i)]: int(n) / labels.numel() for i, n in zip(values, counts, strict=True)}
    assert prediction.shares == pytest.approx(expected)
    assert prediction.labels == "streamed/image/labels.npy"
    shares = [share for _, share in prediction.class_shares()]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "much"], "memory must be a number of bytes"),
        (["--memory", "1kB"], "memory must be at least"),
        (["--on-bad-image", "skip"], "on_bad_image has no effect with stream"),
        (["digit.png"], "not both"),
        (["--stream-results", "labels"], "labels need a Segmenter"),
    ],
)
def test_options_that_do_not_fit(options, message, trained, large, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", *options, "--checkpoint", str(trained), "--stream", str(large)]) == 1
    assert message in capsys.readouterr().err


def test_a_model_that_compares_tokens_is_refused(trained_vit, large, tmp_path, capsys):
    args = ["predict", "--checkpoint", str(trained_vit), "--stream", str(large)]
    assert main([*args, "--stream-folder", str(tmp_path / "out")]) == 1
    assert "blocks.0.attn is MHSA" in capsys.readouterr().err
