"""The model before its classes are known: no values, no draws, no weights read twice."""

import pytest
import torch

from cbsa_torch.models.checkpoint import load_checkpoint
from cbsa_torch.train import build, train
from cbsa_torch.train.config import ModelConfig
from cbsa_torch.train.data import input_spec
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.run.folder import RunFolder


@pytest.mark.parametrize(
    ("name", "mode"), [("cbt_pico_patch1_8", "L"), ("cbt_tiny_patch16_224", "RGB"), ("resnet18", "RGB")]
)
def test_a_draft_tells_the_input_and_draws_nothing(config, name, mode):
    config.model = ModelConfig(name=name)
    before = torch.get_rng_state()
    model, _ = build.draft_model(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert input_spec(model).mode == mode


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_a_run_builds_and_reads_its_model_once(config, tmp_path, monkeypatch, fine_tuned):
    if fine_tuned:
        train(config)
        config.model = ModelConfig(name=config.model.name, init_from=config.output)
        config.output = str(tmp_path / "other")
    counts = {"built": 0, "read": 0}
    create = build.timm.create_model

    def built(*args, **kwargs):
        model = create(*args, **kwargs)
        counts["built"] += next(model.parameters()).device.type != "meta"
        return model

    def read(path):
        counts["read"] += 1
        return load_checkpoint(path)

    monkeypatch.setattr(build.timm, "create_model", built)
    monkeypatch.setattr(build, "load_checkpoint", read)
    train(config)
    assert counts == {"built": 1, "read": 1 if fine_tuned else 0}


@pytest.mark.parametrize("key", ["pretrained", "checkpoint_path", "pretrained_cfg"])
def test_arguments_with_which_no_checkpoint_opens_are_refused_before_training(config, key):
    config.model.args[key] = "true"
    with pytest.raises(ConfigError, match=f"model.args {key} is not allowed"):
        train(config)
    assert not RunFolder(config.output).path.exists()
