"""What does not fit is named; what is not given is filled in."""

import pytest
import torch

from cbsa_torch import ops
from cbsa_torch.ops.cbsa.inputs import check_projection

MASK = torch.ones(2, 4, dtype=torch.bool)
GOOD = {"tokens": torch.zeros(2, 3, 4, 5), "representatives": torch.zeros(2, 3, 6, 5)}
BAD_INPUT = [
    ({"tokens": torch.zeros(2, 3, 5)}, ValueError, r"tokens must have shape \(B, H, N, P\), got \(2, 3, 5\)"),
    ({"tokens": torch.zeros(2, 3, 4, 5, dtype=torch.long)}, TypeError, r"tokens .*floating.*torch.int64"),
    ({"tokens": [1, 2]}, TypeError, "tokens must be a torch.Tensor, got list"),
    ({"tokens": torch.zeros(2, 3, 0, 5)}, ValueError, "tokens must not be empty"),
    ({"representatives": torch.zeros(2, 3, 6, 7)}, ValueError, r"representatives .*\(2, 3, any, 5\).*6, 7\)"),
    ({"representatives": torch.zeros(2, 3, 6, 5).double()}, TypeError, "representatives must have the dtype"),
    ({"representatives": torch.zeros(2, 3, 6, 5, device="meta")}, ValueError, "on the device of tokens"),
    ({"keys": torch.zeros(2, 3, 9, 5)}, ValueError, "keys must have as many rows as tokens.*broadcast='softm"),
    ({"values": torch.zeros(2, 3, 9, 5)}, ValueError, "values must have shape"),
    (
        {"keys": torch.zeros(2, 3, 9, 5), "broadcast": "softmax", "token_mask": MASK},
        ValueError,
        "key_mask is required",
    ),
    ({"token_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"token_mask .*\(B, N\).*\(2, 5\)"),
    ({"token_mask": torch.ones(2, 4)}, TypeError, "token_mask must have dtype torch.bool"),
    ({"representative_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "representative_mask"),
    ({"step_tokens": torch.ones(2)}, ValueError, r"step_tokens must have shape \(H,\)"),
    ({"step_representatives": torch.ones(3, dtype=torch.long)}, TypeError, "step_representatives"),
    ({"token_mask": MASK.to("meta")}, ValueError, "token_mask must be on the device of tokens"),
    ({"key_mask": MASK.to("meta")}, ValueError, "key_mask must be on the device of tokens"),
    (
        {"representative_mask": torch.ones(2, 6, dtype=torch.bool, device="meta")},
        ValueError,
        "representative_mask must be on the device of tokens",
    ),
    ({"step_tokens": torch.ones(3, device="meta")}, ValueError, "step_tokens must be on the device of tokens"),
    ({"contraction": "sofmax"}, ValueError, "contraction .*'softmax', 'exact', 'none'.*did you mean 'softmax'"),
    ({"broadcast": "share"}, ValueError, "broadcast .*did you mean 'shared'"),
    ({"eps": 0.0}, ValueError, "eps must be positive"),
    ({"eps": "a"}, TypeError, "eps must be a number, got 'a'"),
    ({"eps": 1e-200}, ValueError, "eps must be positive"),
    ({"scale": "a"}, TypeError, "scale must be a number"),
    ({"step_tokens": None}, TypeError, "step_tokens must be a number, got None"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD_INPUT, ids=[next(iter(c[0])) for c in BAD_INPUT])
def test_bad_input_is_named(change, kind, message):
    with pytest.raises(kind, match=message):
        ops.cbsa_inputs(**{**GOOD, **change})


def test_defaults_are_filled_in():
    inputs = ops.cbsa_inputs(**GOOD, token_mask=MASK)
    assert inputs.keys is inputs.values is inputs.tokens is GOOD["tokens"]
    assert inputs.key_mask is MASK
    assert inputs.scale == 5**-0.5
    assert inputs.attention is None


ATTENTION = torch.zeros(2, 3, 6, 4)
BAD_ATTENTION = [
    (torch.zeros(2, 3, 4, 6), ValueError, r"attention must have shape \(B, H, M, N\) = \(2, 3, 6, 4\)"),
    (ATTENTION.double(), TypeError, "attention must have the dtype of tokens"),
    (ATTENTION.to("meta"), ValueError, "attention must be on the device of tokens"),
    (ATTENTION.long(), TypeError, "attention must have a floating-point dtype"),
    ("softmax", TypeError, "attention must be a torch.Tensor, got str"),
]


@pytest.mark.parametrize(("attention", "kind", "message"), BAD_ATTENTION, ids=range(len(BAD_ATTENTION)))
def test_a_bad_attention_is_named(attention, kind, message):
    with pytest.raises(kind, match=message):
        ops.cbsa_inputs(**GOOD, attention=attention)


def test_contract_and_broadcast_needs_an_attention():
    with pytest.raises(TypeError, match="attention must be a torch.Tensor, got NoneType"):
        ops.contract_and_broadcast(**GOOD, attention=None)


@pytest.mark.parametrize(
    "option",
    [
        {"keys": GOOD["tokens"]},
        {"values": GOOD["tokens"]},
        {"key_mask": MASK},
        {"step_representatives": torch.ones(3)},
        {"step_representatives": 0.5},
        {"broadcast": "softmax"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_the_extraction_are_refused_beside_an_attention(option):
    assert ops.cbsa_inputs(**GOOD, attention=ATTENTION).attention is ATTENTION
    with pytest.raises(ValueError, match="attention cannot be given beside keys, values"):
        ops.cbsa_inputs(**GOOD, attention=ATTENTION, **option)


@pytest.mark.parametrize(
    ("weight", "bias", "kind", "message"),
    [
        (torch.ones(3, 7), None, ValueError, r"out_weight must have shape \(C, H \* P\) = \(any, 15\)"),
        (torch.ones(3, 15), torch.ones(4), ValueError, r"out_bias must have shape \(C,\) = \(3\)"),
        (torch.ones(3, 15).long(), None, TypeError, "out_weight must have a floating-point dtype"),
        (None, torch.ones(3), TypeError, "out_weight must be a torch.Tensor, got NoneType"),
        (torch.ones(3, 15, device="meta"), None, ValueError, "out_weight must be on the device of tokens"),
    ],
)
def test_a_bad_projection_is_named(weight, bias, kind, message):
    with pytest.raises(kind, match=message):
        check_projection(ops.cbsa_inputs(**GOOD), weight, bias)
