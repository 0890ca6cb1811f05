"""``cbsa adapt-table`` on a ViT of the digits."""

import json

import pytest

from cbsa_torch.cli import main
from cbsa_torch.cli.adapt_table import markdown
from cbsa_torch.train import evaluate_checkpoint, train
from cbsa_torch.train.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, TrainConfig

VIT = {"patch_size": "2", "in_chans": "1", "embed_dim": "24", "depth": "2", "num_heads": "2"}
AGENT = "agent num_representatives=4"


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    config = TrainConfig(
        output=str(tmp_path_factory.mktemp("vit") / "run"),
        model=ModelConfig("vit_tiny_patch16_224", image_size=8, args=dict(VIT)),
        data=DataConfig(name="digits", workers=0),
        optim=OptimConfig(name="adamw", lr=1e-3, batch_size=128, epochs=1, warmup_epochs=0),
        engine=EngineConfig(cpu=True, tracker="none"),
    )
    return train(config).folder


def test_the_table(vit, tmp_path, capsys):
    output = tmp_path / "table"
    command = ["adapt-table", "--model", str(vit), "--variants", AGENT, "linear layers=-1", "--epochs", "1"]
    command += ["--batch-size", "256", "--threads", "1", "--output", str(output), "--budget", "0.5"]
    assert main([*command, "--seeds", "0", "1", "--image-sizes", "8", "16", "--batches", "2", "2"]) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    original, agent, linear = record["accuracy"]
    test = evaluate_checkpoint(vit, output=tmp_path / "e.json").top1
    assert original.keys() == {"name", "before", "plain"}  # it has no teacher
    assert original["before"] == test
    assert len(original["plain"]) == 2
    for row in (agent, linear):
        assert len(row["plain"]) == len(row["distilled"]) == 2
    run = f"{output}/{AGENT.replace(' ', '_')}_distilled_seed1"
    assert evaluate_checkpoint(run, output=tmp_path / "e.json").top1 == agent["distilled"][1]
    sizes = {(row["name"], row["image_size"]): row for row in record["cost"]}
    assert len(sizes) == 6
    assert sizes[AGENT, 8]["parameters"] == sizes["original", 8]["parameters"]
    assert sizes["linear layers=-1", 16]["parameters"] == sizes["original", 16]["parameters"] + 2
    text = output.with_suffix(".md").read_text()
    assert text == markdown(record)
    assert "| original |" in text
    assert f"| 16² | {AGENT} |" in text
    capsys.readouterr()
    # finished runs are kept, and costs are left out
    assert main([*command, "--seeds", "0", "--image-sizes", "--batches", "2"]) == 0
    assert "val loss" not in capsys.readouterr().out
    assert json.loads(output.with_suffix(".json").read_text())["cost"] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--variants", "cbsaa"], "--variants must be one of adapted_cbsa,"),
        (["--variants", "adapted_cbsa contraction_step"], "--variants must be one of"),
        (["--variants", "linear layers=x"], "layers must be"),
        (["--variants", ""], "--variants must be one of"),
        (["--variants", "adapted_cbsa eps=["], "--variants 'adapted_cbsa eps=['"),
        (["--variants", AGENT, "linear eps=1"], "--variants 'linear eps=1': eps is an option of"),
        (["--variants", "adapted_cbsa foo=1"], "foo is no option of any mixer"),
        (["--cost-of", "resnet18"], "--cost-of resnet18 cannot be measured"),
        (["--cost-of", "vit_tinny"], "--cost-of vit_tinny cannot be measured"),
        (["--batches", "1"], "--batches must have one entry"),
        (["--batches", "1", "0", "1"], "--batches must be at least 1, got 0"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--model", "vit_tinny", "--seeds"], "--model: 'vit_tinny' is neither"),
    ],
)
def test_bad_commands(vit, tmp_path, capsys, args, message):
    output = tmp_path / "table"
    assert main(["adapt-table", "--model", str(vit), "--output", str(output), *args]) == 1
    assert message in capsys.readouterr().err
    assert not output.with_suffix(".json").exists()
