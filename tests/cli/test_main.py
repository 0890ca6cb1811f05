"""The command itself: help, errors, exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

import cbsa_torch
from cbsa_torch.cli import COMMANDS, main
from cbsa_torch.train.registry import recipe_names


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(args, capsys):
    assert main(args) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == cbsa_torch.__version__


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "no command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_a_missing_dependency_says_which_extra(monkeypatch, capsys):
    def missing(extra):
        raise ImportError(f"tyro is missing: pip install cbsa-torch[{extra}]")

    monkeypatch.setattr("cbsa_torch.cli.require", missing)
    assert main(["list"]) == 1
    assert capsys.readouterr().err == "cbsa: tyro is missing: pip install cbsa-torch[train]\n"


def test_commands_that_draw_nothing_need_no_matplotlib(tmp_path):
    """As after ``pip install cbsa-torch[train]``: where matplotlib is asked for, it is not there."""
    script = f"""
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)
from cbsa_torch.cli import main
run = {str(tmp_path / "run")!r}
options = ["--optim.epochs", "1", "--optim.warmup-epochs", "0", "--engine.threads", "1", "--data.workers", "0"]
assert main(["train", "--output", run, *options, "--model.args", "embed_dim", "8", "depth", "1", "num_heads", "1"]) == 0
assert main(["eval", "--checkpoint", run]) == 0
assert main(["count", "cbt_pico_patch1_8"]) == 0
assert main(["list"]) == 0
for command in (["report", "--checkpoint", run], ["compare", run, run], ["bench"], ["report", "--help"]):
    assert main(command) == 1
assert main(["count", "cbt_pico_patch1_8", "--plot", "x.png"]) == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("matplotlib") == 5
    assert "--plot: " in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: cbsa {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "option", "near"),
    [
        ("train", "--optim.batchsize", "--optim.batch-size"),
        ("eval --checkpoint x", "--splt", "--split"),
        ("predict image.png", "--on-bad-imag", "--on-bad-image"),
        ("report --checkpoint x", "--imges", "--images"),
        ("convert --official x", "--outptu", "--output"),
        ("list", "--knd", "--kind"),
    ],
)
def test_an_unknown_option_names_the_nearest(command, option, near, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), option, "1"])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert re.search(rf"{near}\b", captured.err + captured.out)


def test_a_value_of_the_wrong_type_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--optim.epochs", "many"])
    assert caught.value.code == 2
    assert "--optim.epochs" in capsys.readouterr().err


def test_list_names_models_and_recipes(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "cbt_tiny_patch16_224" in out
    assert "stem_vit_tiny_patch16_224" in out
    assert not re.search(r"\bvit_tiny", out)
    assert all(name in out for name in recipe_names())
    assert main(["list", "--kind", "recipes"]) == 0
    assert capsys.readouterr().out.startswith("recipes: ")


@pytest.mark.parametrize("command", ["eval", "report", "predict x.png", "push --repo-id me/mine"])
def test_a_missing_run_is_one_line_and_exit_code_1(command, tmp_path, capsys):
    assert main([*command.split(), "--checkpoint", str(tmp_path / "nowhere")]) == 1
    assert re.fullmatch(r"cbsa: .*nowhere.*\n", capsys.readouterr().err)


def test_ctrl_c_is_exit_code_130_and_a_bug_keeps_its_traceback(monkeypatch, capsys):
    def fail(config):
        raise error

    monkeypatch.setattr("cbsa_torch.cli.train.train", fail)
    error = KeyboardInterrupt
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "cbsa: interrupted\n"
    error = ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_a_real_ctrl_c_during_training_saves_and_exits_75(tmp_path, tiny):
    """That a run goes on from there is tested where the signals are."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "cbsa_torch.cli", "train", "--output", str(run), *tiny, "--optim.epochs", "6"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        # A shell's background jobs, and all they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    for line in process.stdout:
        if line.startswith("epoch   1/6"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75
    line = rf"cbsa: stopped by SIGINT; the last training state is that of epoch \d+.*--output {run} --resume"
    assert re.fullmatch(line, err.strip().splitlines()[-1])
    assert "Traceback" not in out + err
