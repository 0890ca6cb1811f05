"""Every command through ``main``, and one real Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

import cbsa_torch
from cbsa_torch.cli import COMMANDS, main
from cbsa_torch.models import load_checkpoint
from cbsa_torch.train.config import recipe_names

TINY = [
    *("--optim.batch-size", "128", "--optim.warmup-epochs", "0", "--optim.epochs", "1"),
    *("--model.args", "embed_dim", "16", "depth", "1", "num_heads", "2", "num_representatives", "4"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on the digits; tests must not change its model."""
    run = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "--output", str(run), *TINY]) == 0
    return run


@pytest.fixture
def digit(tmp_path) -> Path:
    path = tmp_path / "digit.png"
    Image.fromarray(np.round(load_digits().images[0] * (255 / 16)).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def colours(tmp_path) -> Path:
    """An image folder with nothing but a train split."""
    for i, name in enumerate(("dark", "light")):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for j in range(10):
            Image.new("RGB", (32, 32), (180 * i + 5 * j,) * 3).save(
                tmp_path / "images" / "train" / name / f"{j}.png"
            )
    return tmp_path / "images"


# ---- dispatch


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
    def missing(module, extra):
        raise ImportError(f"{module} is missing: pip install cbsa-torch[{extra}]")

    monkeypatch.setattr("cbsa_torch.cli.require", missing)
    assert main(["list"]) == 1
    assert capsys.readouterr().err == "cbsa: tyro is missing: pip install cbsa-torch[train]\n"


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


def test_list_may_name_only_recipes(capsys):
    assert main(["list", "--kind", "recipes"]) == 0
    assert capsys.readouterr().out.startswith("recipes: ")


# ---- the commands


def test_train_writes_a_run(trained):
    assert (trained / "model.safetensors").exists()
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 1


def test_eval_prints_and_writes_the_accuracy(trained, capsys):
    assert main(["eval", "--checkpoint", str(trained)]) == 0
    record = json.loads((trained / "eval_test.json").read_text())
    out = capsys.readouterr().out
    assert f"test accuracy: {record['top1']:.4f}  top-5: {record['top5']:.4f}" in out
    assert "images: 360" in out


@pytest.mark.parametrize(
    ("command", "option"), [("eval", "--batch-size"), ("report", "--images"), ("report", "--shown")]
)
def test_counts_below_one_are_refused(trained, capsys, command, option):
    assert main([command, "--checkpoint", str(trained), option, "0"]) == 1
    assert capsys.readouterr().err == f"cbsa: {option} must be at least 1, got 0\n"


def test_predict_names_classes(trained, digit, tmp_path, capsys):
    output = tmp_path / "predictions.json"
    args = ["--checkpoint", str(trained), "--top", "3", "--output", str(output)]
    assert main(["predict", str(digit), *args]) == 0
    (row,) = json.loads(output.read_text())
    assert row["image"] == str(digit)
    assert len(row["classes"]) == 3
    out = capsys.readouterr().out
    assert all(f"{p:.4f}" in out for p in row["probabilities"])


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_predict_stops_at_a_bad_image(trained, digit, tmp_path, content, capsys):
    bad = tmp_path / "bad.png"
    if content is not None:
        bad.write_bytes(content)
    assert main(["predict", str(digit), str(bad), "--checkpoint", str(trained)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("cbsa: ")
    assert "bad.png" in err


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_predict_may_skip_a_bad_image(trained, digit, tmp_path, content):
    bad, output = tmp_path / "bad.png", tmp_path / "predictions.json"
    if content is not None:
        bad.write_bytes(content)
    args = ["--checkpoint", str(trained), "--on-bad-image", "skip", "--output", str(output)]
    assert main(["predict", str(bad), str(digit), *args]) == 0
    first, second = json.loads(output.read_text())
    assert "bad.png" in first["error"]
    assert second["error"] is None
    assert len(second["classes"]) == 5


def test_report_writes_a_page(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert main(["report", "--checkpoint", str(run), "--images", "16", "--shown", "2"]) == 0
    accuracy = json.loads((run / "eval_test.json").read_text())["top1"]
    assert f"test accuracy: {accuracy:.4f}" in capsys.readouterr().out
    assert f"{100 * accuracy:.2f}" in (run / "report.html").read_text()


def test_a_run_on_a_folder_without_test_and_val_is_evaluated_and_reported(colours, tmp_path, capsys):
    run = str(tmp_path / "run")
    args = ["--data.root", str(colours), "--data.workers", "0", *TINY, "--optim.batch-size", "8"]
    args += ["--model.name", "cbt_nano_patch4_32", "--optim.epochs", "1", "--output", run]
    assert main(["train", "--config", "folder", *args]) == 0
    assert main(["eval", "--checkpoint", run, "--split", "val"]) == 0
    assert "val accuracy" in capsys.readouterr().out
    assert main(["eval", "--checkpoint", run]) == 1
    assert "no test split" in capsys.readouterr().err
    assert main(["report", "--checkpoint", run, "--images", "2", "--shown", "1"]) == 0


def test_eval_on_another_folder_with_unreadable_images(colours, tmp_path, capsys):
    run = str(tmp_path / "run")
    args = ["--data.root", str(colours), "--data.workers", "0", *TINY, "--optim.batch-size", "8"]
    args += ["--model.name", "cbt_nano_patch4_32", "--output", run]
    assert main(["train", "--config", "folder", *args]) == 0
    other = tmp_path / "other"
    shutil.copytree(colours, other)
    shutil.copytree(colours / "train", other / "test")
    (other / "test" / "dark" / "bad.png").write_bytes(b"")
    assert main(["eval", "--checkpoint", run, "--root", str(other), "--max-bad-images", "0"]) == 1
    assert "bad.png" in capsys.readouterr().err
    assert main(["eval", "--checkpoint", run, "--root", str(other)]) == 0
    out = capsys.readouterr().out
    assert "1 unreadable image(s) were left out" in out
    assert "images: 20" in out


def test_convert_refuses_a_checkpoint_of_ours(trained, tmp_path, capsys):
    output = tmp_path / "ours.safetensors"
    official = trained / "model.safetensors"
    assert main(["convert", "--official", str(official), "--output", str(output)]) == 1
    assert "is not an official checkpoint" in capsys.readouterr().err
    assert not output.exists()


def test_convert_writes_a_model(tmp_path, capsys):
    arguments = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    ours = timm.create_model("cbt_tiny_patch16_224", **arguments, layout="official").state_dict()
    names = {"stem.": "to_patch_embedding.", "norm.": "mlp_head.0.", "head.": "mlp_head.1."}
    names |= {"blocks.0.attn.qkv": "transformer.layers.0.0.fn.proj"}
    names |= {"blocks.0.attn.proj": "transformer.layers.0.0.fn.to_out"}
    names |= {"blocks.0.attn.step_tokens": "transformer.layers.0.0.fn.step_x"}
    names |= {"blocks.0.attn.step_representatives": "transformer.layers.0.0.fn.step_rep"}
    names |= {"blocks.0.norm1": "transformer.layers.0.0.norm", "blocks.0.norm2": "transformer.layers.0.1.norm"}
    names |= {"blocks.0.ista": "transformer.layers.0.1.fn", "pos_embed": "pos_embedding"}
    official = {}
    for key, tensor in ours.items():
        new = next((key.replace(a, b, 1) for a, b in names.items() if key.startswith(a)), key)
        official[new] = tensor.reshape(-1, 1, 1) if ".step_" in new else tensor
    torch.save(official, tmp_path / "official.pth")
    output = tmp_path / "ours.safetensors"
    assert main(["convert", "--official", str(tmp_path / "official.pth"), "--output", str(output)]) == 0
    assert "cbt_tiny_patch16_224" in capsys.readouterr().out
    assert load_checkpoint(output)[0].num_classes == 3


# ---- configuration


def test_train_takes_a_recipe_and_later_options_win(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("cbsa_torch.cli.commands.train", seen.append)
    assert main(["train", "--config", "imagenet", "--optim.lr", "0.5", "--data.root", "x"]) == 0
    assert main(["train", "--optim.lr", "0.5", "--config=imagenet", "--data.root", "x"]) == 0
    assert seen[0] == seen[1]
    assert (seen[0].optim.lr, seen[0].optim.warmup_epochs, seen[0].data.root) == (0.5, 20, "x")


def test_train_takes_a_yaml_file(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("cbsa_torch.cli.commands.train", seen.append)
    (tmp_path / "my.yaml").write_text("seed: 7\nmodel:\n  args: {depth: 2}")
    assert main(["train", "--config", str(tmp_path / "my.yaml")]) == 0
    assert (seen[0].seed, seen[0].model.args) == (7, {"depth": "2"})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "digit"], "did you mean 'digits'"),
        (["--config"], "--config needs"),
        (["--config="], "no configuration ''"),
        (["--config", "folder"], "data.root is required"),
        (["--config", "finetune_pets"], "model.init_from is required"),
        (["--optim.epochs", "0"], "optim.epochs must be at least 1"),
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
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_train_refuses_an_existing_run(trained, capsys):
    assert main(["train", "--output", str(trained), *TINY, "--optim.lr", "0.5"]) == 1
    assert "holds a run of another configuration:\n  optim.lr: 0.001 -> 0.5\n" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["--output RUN --resume", "--output=RUN --resume", "--resume --output RUN"])
def test_a_resumed_run_needs_no_other_options(trained, tmp_path, form, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert main(["train", *form.replace("RUN", str(run)).split()]) == 0
    assert "finished already: epoch 1 of 1" in capsys.readouterr().out


def test_an_overwritten_run_can_be_resumed(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert main(["train", "--output", str(run), "--overwrite", *TINY]) == 0
    assert main(["train", "--output", str(run), "--resume"]) == 0


@pytest.mark.parametrize("command", ["eval", "report"])
def test_a_missing_run_is_one_line_and_exit_code_1(command, tmp_path, capsys):
    assert main([command, "--checkpoint", str(tmp_path / "nowhere")]) == 1
    assert re.fullmatch(r"cbsa: .*nowhere.*\n", capsys.readouterr().err)


def test_predict_with_a_missing_run_is_one_line_and_exit_code_1(digit, tmp_path, capsys):
    assert main(["predict", str(digit), "--checkpoint", str(tmp_path / "nowhere")]) == 1
    assert re.fullmatch(r"cbsa: .*nowhere.*\n", capsys.readouterr().err)


# ---- Ctrl-C


def test_ctrl_c_is_exit_code_130(monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("cbsa_torch.cli.commands.train", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "cbsa: interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(config):
        raise ZeroDivisionError

    monkeypatch.setattr("cbsa_torch.cli.commands.train", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_a_real_ctrl_c_during_training_saves_exits_75_and_resumes(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "cbsa_torch.cli", "train", "--output", str(run)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *TINY, "--optim.epochs", "12"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell's background jobs, and all they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    for line in process.stdout:
        if line.startswith("epoch   1/12"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    line = rf"cbsa: stopped by SIGINT; the last checkpoint is that of epoch \d+.*--output {run} --resume"
    assert re.fullmatch(line, err.strip().splitlines()[-1])
    assert "Traceback" not in out + err
    resumed = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"continuing after epoch \d+ of 12", resumed.stdout)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 13))


def test_model_is_short_for_the_models_name(tmp_path):
    args = ["--output", str(tmp_path / "run"), "--optim.epochs", "1", "--engine.threads", "1"]
    assert main(["train", "--model", "tost_pico_patch1_8", *args]) == 0
    assert "name: tost_pico_patch1_8" in (tmp_path / "run" / "config.yaml").read_text()


def test_count_prints_writes_and_draws(tmp_path, capsys):
    files = ["--output", str(tmp_path / "counts.json"), "--plot", str(tmp_path / "flops.svg")]
    assert main(["count", "cbt_tiny_patch16_224", "crate_tiny_patch16_224", "--layers", *files]) == 0
    out = capsys.readouterr().out
    assert re.search(r"cbt_tiny_patch16_224\s+3x224x224\s+1,789,192\s+1\.121\s+528,768", out)
    assert re.search(r"blocks\.11\.attn\s+MSSA", out)
    rows = json.loads((tmp_path / "counts.json").read_text())
    assert rows[0]["total"]["similarities"] == 528_768
    assert rows[0]["torch_flops"] == rows[0]["total"]["products"]
    assert (tmp_path / "flops.svg").read_text().startswith("<svg")
    curves = json.loads((tmp_path / "flops.json").read_text())
    assert (curves["dim"], curves["num_heads"]) == (192, 3)
    assert all(len(values) == len(curves["tokens"]) for values in curves["flops"].values())
    n, d = curves["tokens"][-1], 192
    assert curves["flops"]["mhsa"][-1] == 2 * n * 4 * d**2 + 4 * n**2 * d  # four projections, two products
    assert curves["flops"]["cbsa"][-1] == 2 * n * 2 * d**2 + 6 * n * 64 * d + 4 * 64**2 * d
    assert curves["flops"]["mlp"][-1] == 2 * n * 8 * d**2


def test_count_takes_any_size_and_any_model(capsys):
    assert main(["count", "cbt_tiny_patch16_224", "resnet10t", "--image-size", "96", "160"]) == 0
    out = capsys.readouterr().out
    assert out.count("3x96x160") == 2
    assert main(["count", "swin_tiny_patch4_window7_224"]) == 0
    assert "torch's own counter sees" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no models given"),
        ("cbt_tinny", "no model 'cbt_tinny' in timm; did you mean 'cbt_tiny_patch16_224'"),
        ("cbt_tiny_patch16_224 --image-size 1 2 3", "--image-size must be one or two positive numbers"),
        ("cbt_tiny_patch16_224 --image-size 0", "--image-size must be one or two positive numbers"),
        ("cbt_tiny_patch16_224 --args contraction exat", "did you mean 'exact'"),
        (
            "cbt_tiny_patch16_224 --output x.json --plot x.png",
            "--output x.json is a file that --plot x.png writes",
        ),
        ("cbt_tiny_patch16_224 --args tied [1", "cannot count cbt_tiny_patch16_224"),
        ("cbt_tiny_patch16_224 --args checkpoint_path x", "--args cannot be checkpoint_path"),
        ("resnet18 --args block foo", "cannot count resnet18"),
        ("cbt_tiny_patch16_224 --args img_size 64 --image-size 32", "cannot count cbt_tiny_patch16_224"),
        ("cbt_tiny_patch16_224 --plot x.pdf", "--plot must end in .png or .svg"),
        ("vit_tiny_patch16_224 --plot x.png", "vit_tiny_patch16_224 has no mixer of ours"),
        ("crate_original_tiny_patch16_224 --image-size 100", "multiples of patch_size 16"),
    ],
)
def test_count_refuses_what_it_cannot(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["count", *arguments.split()]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --model cbt_pico_patch1_8 --model.args tied [1", "model.args are not values of YAML"),
        ("train --model resnet18 --model.args block foo", "cannot build resnet18"),
        ("convert --official x.pth --output x.safetensors --num-heads 0", "--num-heads must be at least 1"),
    ],
)
def test_nonsense_arguments_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 1
    assert message in capsys.readouterr().err


def test_convert_writes_safetensors_only(capsys, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth")
    assert main(["convert", "--official", str(tmp_path / "x.pth"), "--output", str(tmp_path / "y.pth")]) == 1
