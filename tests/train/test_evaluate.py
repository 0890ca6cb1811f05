from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cbsa_torch.cli import main
from cbsa_torch.models import load_checkpoint, save_checkpoint
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.nn.ista import FusedISTA
from cbsa_torch.train import WindowOptions, evaluate, evaluate_checkpoint, predict_images
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.evaluate import open_trained
from cbsa_torch.train.run.folder import RunFolder


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_split_evaluates_and_is_written_down(finished, tmp_path, split):
    _, trained = finished
    output = tmp_path / "evaluation.json"
    result = evaluate_checkpoint(trained.folder, split=split, output=output, batch_size=5)
    assert result.images == {"train": 24, "val": 12, "test": 12}[split]
    record = json.loads(output.read_text())
    assert (record["split"], record["top1"], record["skipped_images"]) == (split, result.top1, [])
    assert result.top5 is None
    assert split != "val" or result.top1 == trained.best_score


def test_evaluation_equals_a_plain_count(finished, tmp_path, images):
    result = evaluate_checkpoint(finished[1].folder, output=tmp_path / "e.json", batch_size=5)
    confusion = np.array(result.confusion)
    assert result.top1 == pytest.approx(np.trace(confusion) / confusion.sum())
    trained = open_trained(finished[1].folder)
    right, loss = 0, 0.0
    root = trained.config.data.root
    for label, name in enumerate(trained.class_names):
        for path in sorted((images / "test" / name).iterdir()):
            path = f"{root}/test/{name}/{path.name}"
            prediction = predict_images(trained, [path], top=3)[0]
            right += prediction.classes[0] == name
            loss -= np.log(prediction.probabilities[prediction.classes.index(name)])
        assert confusion[label].sum() == 4
    assert result.top1 == pytest.approx(right / 12)
    assert result.loss == pytest.approx(loss / 12, rel=1e-4)


def test_a_missing_split_is_refused(finished, tmp_path, images):
    shutil.rmtree(images / "test")
    data = dataclasses.replace(finished[0].data, root=str(images))
    with pytest.raises(DataError, match="no test split"):
        evaluate_checkpoint(finished[1].folder, data=data, output=tmp_path / "e.json")


def test_data_with_other_classes_is_refused(finished, tmp_path, images):
    for split in ("train", "val", "test"):
        (images / split / "red").rename(images / split / "rouge")
    data = dataclasses.replace(finished[0].data, root=str(images))
    with pytest.raises(DataError, match=r"test has a class 'rouge' that the training images have not"):
        evaluate_checkpoint(finished[1].folder, data=data, output=tmp_path / "e.json")


def test_a_checkpoint_that_no_run_wrote_is_refused(finished, tmp_path):
    model, info = load_checkpoint(RunFolder(finished[1].folder).weights)
    save_checkpoint(tmp_path / "m.safetensors", model, {k: info[k] for k in ("model", "model_args")})
    with pytest.raises(CheckpointError, match="was not written by a training run"):
        open_trained(tmp_path / "m.safetensors")


def test_predictions_name_the_colours_by_falling_probability(finished, images):
    paths = [images / "test" / name / f"{name}_0.png" for name in ("red", "blue", "green")]
    predictions = predict_images(finished[1].folder, paths, top=2)
    assert [p.classes[0] for p in predictions] == ["red", "blue", "green"]
    assert all(len(p.classes) == 2 and p.error is None for p in predictions)
    (prediction,) = predict_images(finished[1].folder, paths[:1], top=99)
    assert sorted(prediction.classes) == ["blue", "green", "red"]
    assert prediction.probabilities == sorted(prediction.probabilities, reverse=True)
    assert sum(prediction.probabilities) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_images_of_any_mode_and_size_are_classified(finished, tmp_path, mode):
    path = tmp_path / "image.tif"
    Image.new(mode, (70, 9)).save(path)
    assert predict_images(finished[1].folder, [path])[0].error is None


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x89PNG\r\n\x1a\nbroken"])
def test_an_unreadable_image_stops_or_is_reported(finished, images, tmp_path, content):
    bad, good = tmp_path / "bad.png", images / "test" / "red" / "red_0.png"
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.png"):
        predict_images(finished[1].folder, [good, bad])
    first, second = predict_images(finished[1].folder, [bad, good], on_bad_image="skip")
    assert (first.classes, first.probabilities) == ([], [])
    assert "bad.png" in first.error
    assert second.classes[0] == "red"


def test_an_opened_model_evaluates_and_predicts_like_its_file(finished, images, tmp_path, monkeypatch):
    paths, output = sorted((images / "test").rglob("*.png")), tmp_path / "e.json"
    trained = open_trained(finished[1].folder)
    assert not trained.model.training
    expected = predict_images(trained.path, paths), evaluate_checkpoint(trained.path, output=output)
    monkeypatch.setattr(evaluate, "open_weights", lambda *args: pytest.fail("opened again"))
    fused = trained.fused()
    assert (predict_images(fused, paths), evaluate_checkpoint(fused, output=output)) == expected
    predictions, result = predict_images(trained, paths), evaluate_checkpoint(trained, output=output)
    assert [p.classes for p in predictions] == [p.classes for p in expected[0]]
    assert [p.probabilities for p in predictions] == [
        pytest.approx(p.probabilities, rel=1e-4) for p in expected[0]
    ]
    assert result.confusion == expected[1].confusion
    assert result.loss == pytest.approx(expected[1].loss, rel=1e-4)


def test_a_file_is_used_fused_and_a_model_as_it_is(finished, images, tmp_path, monkeypatch):
    seen = []
    forward = FusedISTA.forward
    monkeypatch.setattr(FusedISTA, "forward", lambda layer, x: seen.append(layer) or forward(layer, x))
    path, output = images / "test" / "red" / "red_0.png", str(tmp_path / "e.json")
    folder = str(finished[1].folder)
    trained = open_trained(folder)
    for use in (
        lambda: predict_images(folder, [path]),
        lambda: main(["predict", str(path), "--checkpoint", folder]),
        lambda: evaluate_checkpoint(folder, output=output),
        lambda: main(["eval", "--checkpoint", folder, "--output", output]),
        lambda: predict_images(trained.fused(), [path]),
    ):
        seen.clear()
        use()
        assert seen
    seen.clear()
    predict_images(trained, [path])
    assert not seen


def test_a_classifier_knows_no_windows_and_no_masks(finished, tmp_path):
    trained = open_trained(finished[1].folder)
    with pytest.raises(ConfigError, match="window has no effect for the task 'classification'"):
        evaluate_checkpoint(trained, windows=WindowOptions(window=8), output=tmp_path / "e.json")
    for options in ({"windows": WindowOptions(flip=True)}, {"masks": tmp_path}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=r"^(flip|masks|overwrite) has no effect for the task"):
            predict_images(trained, [], **options)
    assert not list(tmp_path.iterdir())


def test_a_failed_evaluation_moves_the_model_back(finished, tmp_path, monkeypatch):
    trained = open_trained(finished[1].folder)
    moved = []
    monkeypatch.setattr(trained.model, "to", lambda device: moved.append(device) or trained.model)
    monkeypatch.setattr(trained.model, "forward", lambda x: pytest.fail("no forward"))
    with pytest.raises(pytest.fail.Exception, match="no forward"):
        evaluate_checkpoint(trained, output=tmp_path / "e.json")
    assert moved[-1] == next(trained.model.parameters()).device
    assert len(moved) == 2
