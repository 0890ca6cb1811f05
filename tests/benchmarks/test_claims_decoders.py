"""Decoders on a made-up CamVid with a tiny random encoder."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks.claims import decoders, runs
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from cbsa_torch.models import Segmenter
from cbsa_torch.models.counting import count_model
from cbsa_torch.train.losses import mean_loss

COUNTS = {"train": 6, "val": 3, "test": 4}
COLOURS = np.random.default_rng(1).integers(0, 256, (12, 3))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    small = {
        "ENCODER_ARGS": {"img_size": 56, "embed_dim": 384, "depth": 2, "num_heads": 2, "mlp_ratio": 1},
        "SIZE": (42, 56),
        "BLOCKS": (1, 2),
        "FORMS": {form: decoders.FORMS[form]._replace(seeds=1) for form in ("certified", "mhsa")},
        "CHOOSING": ("mhsa",),
        "FINETUNED": ("mhsa",),
        "RECIPE": replace(decoders.RECIPE, batch_size=4, epochs=2),
        "FINETUNING": replace(decoders.FINETUNING, batch_size=4, epochs=1),
        "RATES": (1e-3, 2e-3),
        "TRIAL_EPOCHS": 1,
        "LOSS_SIZE": (6, 8),
        "SIGMAS": (0.1,),
        "DISTURBED": 2,
        "SIDES": (56,),
    }
    for name, value in small.items():
        monkeypatch.setattr(decoders, name, value)
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for part in ("images", "masks"):
            (tmp_path / split / part).mkdir(parents=True)
        for i in range(count):
            mask = random.integers(0, 12, (3, 4)).repeat(15, 0).repeat(15, 1).astype(np.uint8)
            Image.fromarray(COLOURS[mask].astype(np.uint8)).save(tmp_path / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(tmp_path / split / "masks" / f"{i}.png")
    (tmp_path / "classes.txt").write_text("\n".join(f"class{i}" for i in range(11)))
    vit = tmp_path / "vit.safetensors"
    save_file(decoders.make_encoder().state_dict(), vit)
    return runs.Folders(camvid=tmp_path, vit=vit, runs=tmp_path / "runs")


def known_pixels(folders, split):
    masks = [np.asarray(Image.open(path)) for path in (folders.camvid / split / "masks").iterdir()]
    return sum(int((mask != 11).sum()) for mask in masks)


def test_every_run_is_recorded_once(folders, monkeypatch):
    todo = decoders.runs(folders)
    runs.work_through(todo, folders.runs / "locks")
    records = {run.name: runs.read(run.name) for run in todo}
    assert len(records) == len(todo) == 2 + 2 + 2 * 2 + 2 + 1

    trained = [records[f"decoders_{name}"] for name in ("certified_seed0", "mhsa_seed0")]
    for record in (*trained, records["decoders_mhsa_finetuned"]):
        for split in ("val", "test"):  # masks at their own size, ignored pixels nowhere
            assert record[split]["pixels"] == known_pixels(folders, split)
            assert np.sum(record[split]["confusion"]) == record[split]["pixels"]
        assert np.shape(record["robustness"]["values"]) == (1, 3)
        best = max((records[decoders.block_run(block)] for block in (1, 2)), key=lambda one: one["val_miou"])
        assert record["block"] == best["block"]
    for record in trained:
        rates = [records[decoders.trial(record["form"], rate)] for rate in (1e-3, 2e-3)]
        assert record["recipe"]["lr"] == max(rates, key=lambda one: one["val_miou"])["lr"]
    certified = records["decoders_certified_seed0"]["certificates"]["float64"]
    assert certified["holding"] == certified["cases"] == 3 * 3 * 2  # layers, heads, images
    assert "rates" in records["decoders_certified_seed0"]
    assert "rates" not in records["decoders_mhsa_seed0"]

    def twice(*_args, **_kwargs):
        raise AssertionError("done twice")

    for name in ("fit", "measure", "encode", "cost"):
        monkeypatch.setattr(decoders, name, twice)
    runs.work_through(decoders.runs(folders), folders.runs / "locks")


def test_features_are_those_of_the_whole_model(folders):
    decoders.compute_features(folders)
    encoder, images = decoders.open_encoder(folders), decoders.open_images(folders).train
    encoder.prune_intermediate_layers([0])
    model = Segmenter(encoder, decoders.make_decoder("certified")).eval()
    features = decoders.open_features(folders, block=1).train
    assert len(images) == len(features) == 2 * COUNTS["train"]
    for i in (1, 1 + COUNTS["train"]):  # an image and its mirror image
        image, mask = images[i]
        stored, labels = features[i]
        with torch.no_grad():
            torch.testing.assert_close(
                stored.float(), model.forward_features(image[None])[0], rtol=1e-3, atol=1e-3
            )
        assert torch.equal(labels.long(), mask)
        assert labels.min() >= -1
        assert labels.max() < 11
    assert torch.equal(images[1][0].flip(-1), images[1 + COUNTS["train"]][0])


def test_training_goes_on_from_its_last_epoch(folders, tmp_path, monkeypatch):
    labels = torch.randint(-1, 11, (8, 12, 16), dtype=torch.int8)
    data = TensorDataset(torch.randn(8, 384, 3, 4).half(), labels)
    recipe = decoders.RECIPE
    whole, log = decoders.train_decoder(tmp_path / "whole", "certified", 1, data, recipe, 0)
    assert len(log.read_text().splitlines()) == recipe.epochs

    calls = itertools.count()

    def stopping(*args):
        if next(calls) == 3:  # of two steps in each epoch
            raise KeyboardInterrupt
        return mean_loss(*args)

    monkeypatch.setattr(decoders, "mean_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        decoders.train_decoder(tmp_path / "parts", "certified", 1, data, recipe, 0)
    parts, _ = decoders.train_decoder(tmp_path / "parts", "certified", 1, data, recipe, 0)
    assert next(calls) == 4 + 2  # the second epoch alone was done again
    for name, parameter in whole.state_dict().items():
        assert torch.equal(parameter, parts.state_dict()[name]), name
    decoders.train_decoder(tmp_path / "parts", "certified", 2, data, recipe, 0)
    assert next(calls) == 7 + 4  # features of another block: from the start


def test_ignored_labels_teach_nothing(folders, tmp_path):
    labels = torch.full((4, 12, 16), -1, dtype=torch.int8)
    data = TensorDataset(torch.randn(4, 384, 3, 4), labels)
    recipe = replace(decoders.RECIPE, weight_decay=0.0, epochs=1)
    trained, _ = decoders.train_decoder(tmp_path / "ignored", "certified", 1, data, recipe, 0)
    torch.manual_seed(0)
    for name, parameter in decoders.make_decoder("certified").state_dict().items():
        assert torch.equal(parameter, trained.state_dict()[name]), name


@pytest.mark.parametrize("form", ["certified", "mhsa"])
def test_cost_is_the_decoders_share_of_a_segmenter(folders, form):
    model = Segmenter(decoders.make_encoder(), decoders.make_decoder(form))
    layers = [one for one in count_model(model, (3, 42, 56)).layers if one.name.startswith("decoder")]
    assert decoders.cost(form, (42, 56)) == {
        "flops": sum(one.counts.flops for one in layers),
        "similarities": sum(one.counts.similarities for one in layers),
        "parameters": sum(one.parameters for one in layers),
    }
