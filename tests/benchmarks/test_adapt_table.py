"""The table of ways to adapt a ViT, on a ViT of the digits."""

import dataclasses
import json

import pytest
from benchmarks.adapt_table import Options, compare, markdown

from cbsa_torch import train
from cbsa_torch.train.errors import ConfigError

VIT = {"patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
AGENT = "agent num_representatives=4"


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    config = train.TrainConfig(output=str(tmp_path_factory.mktemp("vit") / "run"))
    config.model = train.ModelConfig("vit_tiny_patch16_224", image_size=8, args=dict(VIT))
    config.data = train.DataConfig(name="digits", workers=0)
    config.optim = train.OptimConfig(name="adamw", lr=1e-3, batch_size=128, epochs=1, warmup_epochs=0)
    config.engine = train.EngineConfig(cpu=True, tracker="none")
    return train.train(config).folder


def test_the_table(vit, tmp_path, capsys):
    output = tmp_path / "table"
    options = Options(str(vit), variants=(AGENT, "linear layers=-1"), epochs=1, batch_size=256, threads=1)
    costs = {"image_sizes": (8, 16), "batches": (2, 2), "budget": 0.2}
    options = dataclasses.replace(options, output=str(output), **costs)
    record = compare(options)
    assert json.loads(output.with_suffix(".json").read_text()) == json.loads(json.dumps(record))
    original, agent, linear = record["accuracy"]
    test = train.evaluate_checkpoint(vit, output=tmp_path / "e.json").top1
    assert original.keys() == {"name", "before", "plain"}  # it has no teacher
    assert original["before"] == test
    for row in (agent, linear):
        assert len(row["plain"]) == len(row["distilled"]) == 1
    run = f"{output}/{AGENT.replace(' ', '_')}_distilled_seed0"
    assert train.evaluate_checkpoint(run, output=tmp_path / "e.json").top1 == agent["distilled"][0]
    sizes = {(row["name"], row["image_size"]): row for row in record["cost"]}
    assert len(sizes) == 6
    assert sizes[AGENT, 8]["parameters"] == sizes["original", 8]["parameters"]
    assert sizes["linear layers=-1", 16]["parameters"] == sizes["original", 16]["parameters"] + 2
    text = output.with_suffix(".md").read_text()
    assert text == markdown(record)
    assert f"| 16² | {AGENT} |" in text
    capsys.readouterr()
    again = compare(dataclasses.replace(options, image_sizes=()))
    assert (again["accuracy"], again["cost"]) == (record["accuracy"], [])
    assert "val loss" not in capsys.readouterr().out  # finished runs are kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("cbsaa",)}, "--variants must be one of adapted_cbsa,"),
        ({"variants": ("adapted_cbsa contraction_step",)}, "--variants must be one of"),
        ({"variants": ("linear layers=x",)}, "layers must be"),
        ({"variants": ("adapted_cbsa eps=[",)}, r"--variants 'adapted_cbsa eps=\['"),
        ({"variants": (AGENT, "linear eps=1")}, "--variants 'linear eps=1': eps is an option of"),
        ({"cost_of": "resnet18"}, "--cost-of resnet18 cannot be measured"),
        ({"batches": (1,)}, "--batches must have one entry"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used here"),
        ({"model": "vit_tinny", "seeds": ()}, "--model: 'vit_tinny' is neither"),
    ],
)
def test_bad_options(vit, tmp_path, options, message):
    output = tmp_path / "table"
    with pytest.raises(ConfigError, match=message):
        compare(Options(**{"model": str(vit), "output": str(output), **options}))
    assert not output.with_suffix(".json").exists()
