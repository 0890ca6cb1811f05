"""``cbsa train``."""

import pytest

from cbsa_torch.cli import main


def test_a_recipe_or_file_gives_defaults_and_later_options_win(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("cbsa_torch.cli.train.train", seen.append)
    assert main(["train", "--config", "imagenet", "--optim.lr", "0.5", "--data.root", "x"]) == 0
    assert main(["train", "--optim.lr", "0.5", "--config=imagenet", "--data.root", "x"]) == 0
    assert seen[0] == seen[1]
    assert (seen[0].optim.lr, seen[0].optim.warmup_epochs, seen[0].data.root) == (0.5, 20, "x")
    (tmp_path / "my.yaml").write_text("seed: 7\nmodel:\n  args: {depth: 2}")
    assert main(["train", "--config", str(tmp_path / "my.yaml"), "--model", "tost_pico_patch1_8"]) == 0
    assert (seen[2].seed, seen[2].model.args, seen[2].model.name) == (7, {"depth": 2}, "tost_pico_patch1_8")


def test_an_encoder_from_a_run_goes_before_the_encoder_of_a_recipe(monkeypatch):
    seen = []
    monkeypatch.setattr("cbsa_torch.cli.train.train", seen.append)
    recipe = ["train", "--config", "segmenter_ade20k"]
    assert main([*recipe, "--model.encoder-from", "runs/mine"]) == 0
    assert main([*recipe, "--model.encoder_from=runs/mine"]) == 0
    assert main([*recipe, "--model.encoder-from", "pretrained"]) == 0
    own, again, pretrained = (config.model for config in seen)
    assert own == again
    assert (own.encoder_from, own.args) == ("runs/mine", {"mixer": "cbsa", "freeze_encoder": False})
    assert pretrained.args.keys() == {*own.args, "encoder", "encoder_args"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "digit"], "did you mean 'digits'"),
        (["--config"], "--config needs"),
        (["--config="], "no configuration ''"),
        (["--config", "folder"], "data.root is required"),
        (["--config", "finetune_pets"], "model.init_from is required"),
        (["--optim.epochs", "0"], "optim.epochs must be at least 1"),
        (["--model", "resnet18", "--model.args", "block", "foo"], "cannot build resnet18"),
        (["--model.name", "cbt_pico_patch1_9"], "did you mean 'cbt_pico_patch1_8'"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--overwrite"], "exclude each other"),
    ],
)
def test_what_train_refuses_is_one_line_and_exit_code_1(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("cbsa: ")
    assert "Traceback" not in err
    assert message in err
    assert not list(tmp_path.iterdir())


def test_another_configuration_is_refused_overwrites_and_is_resumed(run, tiny, capsys):
    changed = ["--output", str(run), *tiny, "--optim.lr", "0.5"]
    assert main(["train", *changed]) == 1
    assert "holds a run of another configuration:\n  optim.lr: 0.001 -> 0.5\n" in capsys.readouterr().err
    assert main(["train", *changed, "--overwrite"]) == 0
    assert main(["train", "--output", str(run), "--resume"]) == 0


@pytest.mark.parametrize("form", ["--output RUN --resume", "--output=RUN --resume", "--resume --output RUN"])
def test_a_resumed_run_needs_no_other_options(run, form, capsys):
    assert main(["train", *form.replace("RUN", str(run)).split()]) == 0
    assert "finished already: epoch 1 of 1" in capsys.readouterr().out
