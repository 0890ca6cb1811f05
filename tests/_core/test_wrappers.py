"""Names of parameters without those of wrappers."""

import pytest

from cbsa_torch._core.wrappers import bare_name, bare_state


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("head.weight", "head.weight"),
        ("module.module.head.weight", "head.weight"),
        ("_orig_mod.module.head.weight", "head.weight"),
        ("module._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._orig_mod.norm.bias", "blocks.0.norm.bias"),
        ("blocks.0._checkpoint_wrapped_module.norm.bias", "blocks.0.norm.bias"),
        ("blocks.0.module.norm.bias", "blocks.0.module.norm.bias"),
        ("submodule.weight", "submodule.weight"),
    ],
)
def test_names(name, bare):
    assert bare_name(name) == bare


def test_only_the_count_of_an_average_is_left_out():
    assert bare_state({"n_averaged": 3, "module.w": 1}) == {"w": 1}
    compiled = {"_orig_mod.n_averaged": 3, "_orig_mod.module._orig_mod.w": 1}
    assert bare_state(compiled) == {"w": 1}
    assert bare_state({"n_averaged": 3, "w": 1}) == {"n_averaged": 3, "w": 1}


def test_names_that_become_one_are_refused():
    with pytest.raises(ValueError, match="two entries are called w, but for names of wrappers"):
        bare_state({"w": 1, "module.w": 2})
