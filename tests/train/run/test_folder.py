"""What a run folder may look like: damaged, half there, with files of others in it."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from cbsa_torch.cli import main
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.train import train
from cbsa_torch.train.errors import ConfigError, DataError, RunFolderError
from cbsa_torch.train.run.folder import RunFolder
from tests.helpers.runs import (
    STEPS,
    assert_refused,
    assert_same_run,
    interrupt,
    interrupt_training,
    last,
    rows,
    states,
)

# ---- what may be an output


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("foreign_config", [False, True])
def test_a_folder_that_is_not_a_run_is_refused(config, overwrite, foreign_config):
    folder = Path(config.output)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    if foreign_config:
        (folder / "config.yaml").write_text("theme: dark\n")
    config.overwrite = overwrite
    assert_refused(config, RunFolderError, "holds files that are not a run")


def test_an_empty_folder_may_be_used(config, whole):
    Path(config.output).mkdir()
    train(config)
    assert_same_run(config, whole)


def test_a_file_as_output_is_refused(config):
    Path(config.output).write_text("mine")
    with pytest.raises(RunFolderError, match="is not a folder"):
        train(config)
    assert Path(config.output).read_text() == "mine"


def test_there_must_be_something_to_resume(config):
    config.resume = True
    assert_refused(config, RunFolderError, "nothing to resume")


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_of_another_configuration_is_refused_with_what_changed(config, run, resume):
    config.resume, config.optim.lr, config.model.args["depth"] = resume, 1.0, 2
    expected = (
        r"of another configuration:\n  model\.args\.depth: 1 -> 2\n  optim\.lr: 0\.003 -> 1\.0\ncontinue it"
    )
    assert_refused(config, RunFolderError, expected)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optim", "name", "nonsense"),
        ("optim", "batch_size", 0),
        ("model", "name", "nonsense"),
        ("model", "args", {"depth": 0}),
        ("model", "init_from", "nowhere.safetensors"),
        ("data", "root", "nowhere"),
        ("data", "name", "torch/nonsense"),
    ],
)
def test_what_cannot_work_is_refused_before_a_run_is_overwritten(config, run, section, key, value):
    config.overwrite = True
    setattr(getattr(config, section), key, value)
    assert_refused(config, (ConfigError, DataError, FileNotFoundError), "nonsense|nowhere|batch_size|depth")


# ---- what may lie in it


def test_overwriting_leaves_what_is_not_of_a_run(config, run):
    stale = [run.path / name for name in ("eval_test.json", "report.html")]
    for path in stale:
        path.write_text("{}")
    foreign = [run.path / "notes.txt", run.path / "thesis" / "chapter.tex", run.state_folder / "backup.pt"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    events = list(run.tensorboard.rglob("events.*"))
    assert events
    config.overwrite, config.optim.epochs = True, 1
    train(config)
    assert [path.read_text() for path in foreign] == ["mine"] * 3
    assert not [path for path in (*stale, *events) if path.exists()]
    assert [row["epoch"] for row in rows(config)] == [1]
    assert len(states(config)) == 1


def test_overwriting_leaves_no_empty_folders(config, run, monkeypatch):
    config.overwrite, config.engine.tracker = True, "none"
    monkeypatch.setattr("cbsa_torch.train.trainer._run_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    names = {path.name for path in run.path.iterdir()}
    assert names == {"config.yaml", "environment.json", "metrics.jsonl", ".run.lock"}


@pytest.mark.parametrize("source", ["", "model.safetensors"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_does_not_start_from_its_own_weights(config, run, source, overwrite):
    config.model.args, config.model.init_from = {}, str(run.path / source)
    config.overwrite = overwrite
    assert_refused(config, RunFolderError, r"model\.init_from .* lies in output .*, where the run writes")


def test_data_inside_an_output_is_not_overwritten(config, run):
    shutil.move(config.data.root, run.path / "images")
    link = run.path.parent / "link"
    link.symlink_to(run.path / "images")
    config.overwrite = True
    for root in (run.path / "images", link):
        config.data.root = str(root)
        assert_refused(config, RunFolderError, r"data\.root .* lies in output .* to be overwritten")


def test_a_run_needs_no_description_of_its_environment(config, run, capsys):
    run.environment.unlink()
    train(config)
    assert "finished already: epoch 2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True)])
def test_a_run_without_configuration_is_named(config, run, resume, overwrite):
    run.config.unlink()
    config.resume, config.overwrite = resume, overwrite
    assert_refused(config, RunFolderError, r"holds files of a run, but no config\.yaml: put it back")


def test_an_empty_configuration_is_not_taken_for_the_defaults(config, run):
    run.config.write_text("")
    assert_refused(config, ConfigError, r"config\.yaml is empty")
    config.overwrite = True
    train(config)
    assert len(rows(config)) == 2


def test_a_killed_overwriting_can_be_repeated_without_environment(config, run, monkeypatch):
    run.environment.unlink()
    config.overwrite = True
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "describe", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config)
    assert len(rows(config)) == 2


def test_a_folder_among_the_states_is_passed_over(config, run, capsys):
    (run.state_folder / "step_9999999999.state").mkdir()
    config.optim.epochs, config.accept_changes = 3, True
    train(config)
    assert "continuing after epoch 2 of 3" in capsys.readouterr().out
    assert len(states(config)) == 2


def test_lost_states_are_not_trained_over(config, run):
    shutil.rmtree(run.state_folder)
    assert_refused(config, RunFolderError, "holds a run of 2 epochs, but no state to go on from")
    config.overwrite = True
    train(config)
    assert len(states(config)) == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "model.safetensors", "states"])
def test_a_folder_in_the_place_of_a_file_and_the_reverse_are_named(config, run, name):
    path = run.path / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("")
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(RunFolderError, match=rf"{name} is (not )?a folder.*; move it away"):
        train(config)


BAD_LINES = {
    "number": b"5",
    "empty mapping": b"{}",
    "list": b'["epoch"]',
    "bytes": b"\xff\xfe\x00",
    "huge number": b'{"epoch": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 50_000,
    "no epoch": b'{"epoch": null, "val_top1": 0.5}',
    "cut short": b'{"epoch": 3, "st',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_lines_that_are_no_rows_are_left_aside_and_named(tmp_path, line):
    problems = []
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(
        b'{"epoch": 1, "val_top1": null}\n' + line + b'\n\n{"epoch": 2, "val_top1": NaN}\n'
    )
    good = folder.read_metrics(problems.append)
    assert [row["epoch"] for row in good] == [1, 2]
    assert len(problems) == 1
    assert problems[0].startswith(f"{folder.metrics}, line 2, is left aside: it ")
    assert len(problems[0]) < 300


def test_bad_lines_stop_neither_a_run_nor_its_readers(config, run, capsys):
    with run.metrics.open("ab") as file:
        file.write(b"\n".join(BAD_LINES.values()) + b"\n")
    run.environment.write_bytes(b"\xff{")
    args = ["--images", "4", "--shown", "1", "--robustness-images", "0"]
    assert main(["report", "--checkpoint", str(run.path), *args]) == 0
    assert capsys.readouterr().out.count("is left aside") == len(BAD_LINES)
    train(config)
    assert capsys.readouterr().out.count("is left aside") == len(BAD_LINES)
    assert [row["epoch"] for row in map(json.loads, run.metrics.read_text().splitlines())] == [1, 2]


@pytest.fixture
def stopped(config):
    """Stopped in the second epoch, with a state of its first step."""
    config.engine.save_steps = 1
    interrupt_training(config, STEPS + 2)
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.move, "on 3 classes, the data has 3; new: 'rouge', missing: 'red'. Put"),
        (shutil.copytree, "on 3 classes, the data has 4; new: 'rouge'"),
    ],
)
def test_other_classes_are_refused_by_name(stopped, change, message):
    for split in ("train", "val", "test"):
        root = Path(stopped.data.root) / split
        change(root / "red", root / "rouge")
    assert_refused(stopped, CheckpointError, message, folder=RunFolder(stopped.output).state_folder)


def test_another_number_of_images_is_said(stopped, capsys):
    root = Path(stopped.data.root)
    for path in list((root / "train").rglob("*_1.png")):
        path.unlink()
    shutil.copy(root / "val" / "red" / "red_0.png", root / "val" / "red" / "more.png")
    train(copy.deepcopy(stopped))
    said = capsys.readouterr().out
    assert "the data has 21 training images, 24 when the state was saved" in said
    assert "the data has 13 validation images, 12 when the state was saved" in said
    assert "the epoch under way is not what it would have been" in said
    assert last(stopped)["data"] == {
        "class_names": ["blue", "green", "red"], "training": 21, "validation": 13
    }  # fmt: skip
