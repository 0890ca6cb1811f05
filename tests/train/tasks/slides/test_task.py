"""The task on small slides: it trains, resumes to the same numbers, evaluates, predicts; bad input is named."""

import copy
import json
import shutil

import h5py
import numpy as np
import pytest
import torch

from cbsa_torch.train import evaluate_checkpoint, open_trained, predict_images, train
from cbsa_torch.train.config import dump_yaml
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.registry import task_of
from cbsa_torch.train.tasks.slides.bags import Bags, FeatureSpec, RandomTiles, read_for
from cbsa_torch.train.tasks.slides.files import Slide
from tests.helpers import processes
from tests.helpers.runs import assert_refused, assert_same_run, interrupt_training, last, rows
from tests.helpers.slides import WIDTH, other, slides_config, write_slides, write_trident


@pytest.fixture(scope="session")
def slides(tmp_path_factory):
    return write_slides(tmp_path_factory.mktemp("slides") / "features")


@pytest.fixture(scope="session")
def finished(slides, tmp_path_factory):
    """A run that learned what positive slides have; tests must not change it."""
    config = slides_config(slides, tmp_path_factory.mktemp("finished") / "run")
    config.optim.epochs = 10
    train(copy.deepcopy(config))
    return config


def test_it_learns(finished):
    losses = [row["train_loss"] for row in rows(finished)]
    assert losses[-1] < 0.5 * losses[0]
    assert max(row["val_auc"] for row in rows(finished)) == 1
    result = evaluate_checkpoint(finished.output)
    assert (result.auc, result.images, np.sum(result.confusion)) == (1, 8, 8)
    record = json.loads((open_trained(finished.output).path.parent / "eval_test.json").read_text())
    assert record["auc"] == 1
    assert set(record) >= {"balanced_accuracy", "loss", "confusion", "class_names"}
    packed = evaluate_checkpoint(finished.output, batch_size=3)
    assert packed.loss == pytest.approx(result.loss, abs=1e-6)


def test_the_card_says_what_the_model_is_fed(finished):
    card = (open_trained(finished.output).path.parent / "README.md").read_text()
    assert "A classifier of whole slides: sets of features: CBSA" in card.replace("\\", "")
    assert "| width of the features | 8 |" in card
    assert "create_transform" not in card
    assert "Measured on slides like those" in card


def test_an_interrupted_run_ends_as_one_that_was_not(slides, tmp_path):
    config = slides_config(slides, tmp_path / "run")
    config.engine.save_steps = 1
    train(copy.deepcopy(config))
    again = other(config, tmp_path / "again")
    interrupt_training(again, 17)
    train(copy.deepcopy(again))
    assert_same_run(config, again)


def test_processes_that_share_the_tiles_of_slides_train_like_one(slides, tmp_path):
    config = slides_config(slides, tmp_path / "run")
    alone = other(config, tmp_path / "alone")
    train(copy.deepcopy(alone))
    config.engine.context_parallel = 2
    processes.train(2, config)
    for first, second in zip(rows(config), rows(alone), strict=True):
        assert first["step"] == second["step"]
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-4)
        assert first["val_loss"] == pytest.approx(second["val_loss"], rel=1e-4)
    torch.testing.assert_close(last(config)["model"], last(alone)["model"], rtol=1e-3, atol=1e-4)


def test_several_slides_in_one_pass_cannot_be_shared(slides, tmp_path):
    config = slides_config(slides, tmp_path / "run")
    config.engine.context_parallel, config.engine.compile = 2, True
    with pytest.raises(ConfigError, match=r"engine\.compile must be off with engine\.context_parallel"):
        train(copy.deepcopy(config))
    config.engine.compile = False
    config.engine.context_parallel, config.engine.accumulate = 2, 1
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    result = processes.run(2, "train", "--config", str(path))
    assert result.returncode != 0
    assert (
        "spreads one slide at a time, and a forward pass has 2" in result.stderr
    )  # torchrun may stop the other


def test_several_slides_in_one_pass_are_each_alone(slides, finished):
    trained = open_trained(finished.output)
    bags = [read_for(trained.spec, slides / f"s{i:02}.h5") for i in (0, 1, 2)]
    with torch.no_grad():
        alone = torch.cat([Bags.of([bag], trained.spec).logits(trained.model) for bag in bags])
        torch.testing.assert_close(
            Bags.of(bags, trained.spec).logits(trained.model), alone, atol=1e-5, rtol=1e-5
        )


def test_predictions(slides, finished, tmp_path):
    first, second = predict_images(finished.output, [slides / "s01.h5", slides / "s00.h5"])
    assert (first.classes[0], second.classes[0]) == ("tumour", "normal")
    assert sum(first.probabilities) == pytest.approx(1)
    write_trident(tmp_path / "wide.h5", np.ones((3, WIDTH + 1)), np.ones((3, 2)))
    with pytest.raises(DataError, match=r"wide\.h5 has features of width 9, expected 8"):
        predict_images(finished.output, [tmp_path / "wide.h5"])
    (prediction,) = predict_images(finished.output, [tmp_path / "wide.h5"], on_bad_image="skip")
    assert "width 9" in prediction.error


def test_random_tiles_are_some_of_them_in_order():
    slide = Slide(torch.arange(20.0)[:, None], torch.arange(40).view(20, 2), None)
    torch.manual_seed(0)
    drawn = RandomTiles(7)(slide)
    kept = drawn.features[:, 0].long()
    assert len(kept) == 7
    assert (kept.diff() > 0).all()
    assert torch.equal(drawn.coords, slide.coords[kept])
    assert RandomTiles(20)(slide) is slide


def test_classes_weigh_the_same_in_all(slides, tmp_path):
    """Inversely to their slides, 1 on average: 3 normal and 1 tumour of the training split."""
    root = tmp_path / "features"
    shutil.copytree(slides, root)
    split = ["train"] * 7 + ["val"] * 2
    labels = ["normal", "tumour"] + ["normal"] * 5 + ["normal", "tumour"]
    table = [f"s{i:02},{label},{part}" for i, (label, part) in enumerate(zip(labels, split, strict=True))]
    (root / "slides.csv").write_text("\n".join(["slide,label,split", *table]))
    task = task_of(slides_config(root, tmp_path / "run"))
    setup = task.open(tmp_path / "skipped.txt", continued=False)

    class Constant(torch.nn.Module):
        def forward(self, features, coords, cu_seqlens):
            return torch.zeros(1, 2)

    bags = Bags.of([setup.train[0][0]], FeatureSpec(WIDTH, True))
    ratio = setup.loss(Constant(), bags, torch.tensor([1])) / setup.loss(Constant(), bags, torch.tensor([0]))
    assert ratio.item() == pytest.approx(6)
    mean = sum(setup.loss(Constant(), bags, torch.tensor([label])) for label in setup.train.targets) / 7
    assert mean.item() == pytest.approx(np.log(2))


def without_coordinates(root):
    with h5py.File(root / "s05.h5", "a") as file:
        del file["coords"]


def another_width(root):
    write_trident(root / "s05.h5", np.ones((9, WIDTH + 2), dtype=np.float32), np.ones((9, 2)))


def a_slide_is_missing(root):
    (root / "s05.h5").unlink()


def a_label_is_missing(root):
    text = (root / "slides.csv").read_text()
    (root / "slides.csv").write_text(text.replace("s05,tumour", "s05,"))


def one_class(root):
    text = (root / "slides.csv").read_text()
    (root / "slides.csv").write_text(text.replace("tumour", "normal"))


def no_tumour_in_validation(root):
    rows = [
        f"s{i:02},{'tumour' if i % 2 and i < 20 else 'normal'},{'train' if i < 20 else 'val'}"
        for i in range(24)
    ]
    (root / "slides.csv").write_text("\n".join(["slide,label,split", *rows]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_coordinates, r"s05\.h5 has no coordinates; data\.coords false"),
        (another_width, r"features of width (10|8)"),
        (a_slide_is_missing, "slide 's05': neither s05.h5 nor s05.pt"),
        (a_label_is_missing, "line 7: no label"),
        (one_class, "all slides have the label 'normal'"),
        (no_tumour_in_validation, "val split has no slide of tumour"),
    ],
)
def test_bad_data_is_named_before_anything_is_written(damage, message, slides, tmp_path):
    root = tmp_path / "features"
    shutil.copytree(slides, root)
    damage(root)
    assert_refused(slides_config(root, tmp_path / "run"), DataError, message)


def test_features_that_are_not_finite_stop_the_run(slides, tmp_path):
    root = tmp_path / "features"
    shutil.copytree(slides, root)
    for path in root.glob("*.h5"):
        with h5py.File(path, "a") as file:
            file["features"][3, 1] = np.inf
    with pytest.raises(DataError, match="features that are not finite, first in row 3"):
        train(slides_config(root, tmp_path / "run"))


def test_settings_that_cannot_work(slides, tmp_path):
    for change, message in (
        (
            lambda c: setattr(c.model, "name", "cbt_tiny_patch16_224"),
            "model.name must be a model of sets of features",
        ),
        (lambda c: setattr(c.model, "image_size", 8), "model.image_size must be left out"),
        (lambda c: setattr(c.data, "max_tiles", 0), "data.max_tiles must be at least 1"),
        (lambda c: setattr(c.data, "test_fraction", 1.0), "data.test_fraction must be in"),
        (lambda c: setattr(c.data, "coords", False), "data.coords must be true for this model"),
        (lambda c: c.model.args.update(in_dim=5), "in_dim 5 is not the width of the features, 8"),
    ):
        config = slides_config(slides, tmp_path / "run")
        change(config)
        assert_refused(config, ConfigError, message)


def test_without_coordinates(slides, tmp_path):
    """From files without any: .pt of CLAM."""
    root = tmp_path / "features"
    shutil.copytree(slides, root)
    for path in root.glob("*.h5"):
        with h5py.File(path) as file:
            torch.save(torch.from_numpy(file["features"][...]), path.with_suffix(".pt"))
        path.unlink()
    config = slides_config(root, tmp_path / "run", positions="none", representatives="learned")
    config.data.coords, config.optim.epochs = False, 1
    train(copy.deepcopy(config))
    assert evaluate_checkpoint(config.output).images == 8
