import pytest
import torch
from torch import nn

from cbsa_torch._core.modes import evaluating, uncompiled


def test_every_module_is_in_its_own_mode_afterwards():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    model[1].eval()
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()


def test_hooks_of_a_compiled_model_run():
    layer, seen = nn.Linear(2, 2), []
    compiled = torch.compile(nn.Sequential(layer), backend="eager")
    compiled(torch.ones(1, 2))
    layer.register_forward_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    with uncompiled():
        compiled(torch.ones(1, 2))
    assert seen == [False]
