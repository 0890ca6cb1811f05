import pytest
import torch

from cbsa_torch import ops
from tests.helpers.compare import assert_close

N, M = [5, 0, 9, 5, 1, 2100], [3, 2, 4, 3, 1, 4]
CU, CUM = (torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in (N, M))


@pytest.mark.parametrize("impl", ["auto", "eager", "tiled"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("contraction", ["softmax", "exact", "none"])
def test_every_sequence_is_what_it_is_alone(impl, contraction, separate):
    tokens, keys, values = (torch.randn(1, 2, sum(N), 4, dtype=torch.float64) for _ in range(3))
    leaves = [tokens, torch.randn(1, 2, sum(M), 4, dtype=torch.float64), torch.rand(2, dtype=torch.float64)]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, *((keys, values) if separate else ()))]
    cotangent = torch.randn_like(tokens)

    def alone(tokens, representatives, step, *rest):
        outs = []
        for i, n in enumerate(N):
            if n:
                at, of = slice(CU[i], CU[i + 1]), slice(CUM[i], CUM[i + 1])
                own = dict(zip(("keys", "values"), (r[:, :, at] for r in rest), strict=False))
                outs.append(
                    ops.cbsa(
                        tokens[:, :, at],
                        representatives[:, :, of],
                        step_tokens=step,
                        contraction=contraction,
                        **own,
                    )
                )
        return torch.cat(outs, 2)

    def packed(tokens, representatives, step, *rest):
        own = dict(zip(("keys", "values"), rest, strict=False))
        places = {"cu_seqlens": CU, "cu_representatives": CUM}
        return ops.cbsa(
            tokens, representatives, step_tokens=step, contraction=contraction, impl=impl, **places, **own
        )

    out, expected = packed(*leaves), alone(*leaves)
    assert_close(out.detach(), expected.detach(), 1e-10)
    used = leaves[1:] if separate else leaves
    found = torch.autograd.grad(out, used, cotangent)
    for got, want in zip(found, torch.autograd.grad(expected, used, cotangent), strict=True):
        assert_close(got, want, 1e-10)


TOKENS, REPRESENTATIVES = torch.randn(1, 2, sum(N), 4), torch.randn(1, 2, sum(M), 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cu_representatives": None}, "cu_seqlens and cu_representatives must be given together"),
        ({"token_mask": torch.ones(1, sum(N), dtype=torch.bool)}, "masks must be None beside cu_seqlens"),
        ({"cu_representatives": CUM[:-1]}, "cu_representatives must be of the 6 sequences"),
        ({"cu_representatives": CUM - CUM[0] + torch.tensor([0, 0, 0, 0, 0, 0, 1])}, "must end at the rows of representatives"),
        ({"cu_seqlens": CU + 1}, "cu_seqlens must start at 0"),
        ({"cu_representatives": torch.tensor([0, 0, 5, 9, 12, 13, 17])}, "every sequence with tokens a representative"),
        ({"tokens": TOKENS.expand(2, -1, -1, -1)}, "tokens must have shape"),
    ],
)  # fmt: skip
def test_bad_inputs_are_named(kwargs, message):
    given = {
        "tokens": TOKENS,
        "representatives": REPRESENTATIVES,
        "cu_seqlens": CU,
        "cu_representatives": CUM,
        **kwargs,
    }
    with pytest.raises(ValueError, match=message):
        ops.cbsa(**given)


FIRST = 1
CERTIFIED = {
    "pooled": lambda tokens, n: ops.pool_representatives(tokens, (1, n), 3),
    "at coordinates": lambda tokens, n: ops.pool_by_coordinates(tokens, PLACES[n], 3),
    "masked": lambda tokens, n: ops.pool_representatives(
        tokens, (1, n), 3, token_mask=torch.arange(n)[None] != 1
    ),
    "constant": lambda tokens, n: ops.Representatives(GUESS.expand(1, -1, -1, -1)),
}
PLACES = {n: torch.rand(1, n, 2) for n in (4, 8, 2099)}
GUESS = torch.randn(1, 2, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize("impl", ["auto", "eager", "tiled"])
@pytest.mark.parametrize("kind", CERTIFIED)
def test_certified_steps_of_every_sequence_are_what_they_are_alone(impl, kind):
    lengths = [5, 0, 9, 5, 2100]
    cu = torch.tensor([0, 5, 5, 14, 19, 2119], dtype=torch.int32)
    tokens = torch.randn(1, 2, sum(lengths), 4, dtype=torch.float64, requires_grad=True)
    fraction = torch.rand(2, dtype=torch.float64, requires_grad=True)
    parts = tokens.split(lengths, 2)
    chosen = [
        CERTIFIED[kind](part[:, :, FIRST:], part.shape[2] - FIRST) if part.shape[2] else None for part in parts
    ]
    options = {"fraction": fraction, "step_representatives": 0.7, "num_prefix_tokens": FIRST}
    out = ops.certified_cbsa(tokens, chosen, cu_seqlens=cu, impl=impl, **options)
    pairs = [(part, own) for part, own in zip(parts, chosen, strict=True) if own is not None]
    expected = torch.cat([ops.certified_cbsa(*pair, impl="eager", **options) for pair in pairs], 2)
    assert_close(out.detach(), expected.detach(), 1e-10)
    assert out.abs().amax() > 0
    cotangent = torch.randn_like(tokens)
    found, wanted = (
        torch.autograd.grad(y, (tokens, fraction), cotangent, retain_graph=True) for y in (out, expected)
    )
    for got, want in zip(found, wanted, strict=True):
        assert_close(got, want, 1e-10)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"representatives": ops.Representatives(REPRESENTATIVES)}, "a list with one ops.Representatives for each of 6"),
        ({"representatives": [ops.Representatives(REPRESENTATIVES)] * 5}, "for each of 6 sequences .*, got 5"),
        ({"representatives": [None] * 6}, r"values \(1, H, M, P\) for sequence 0, got NoneType"),
        ({"cu_seqlens": CU + 1}, "cu_seqlens must start at 0"),
        ({"cu_seqlens": CU[:-1]}, r"cu_seqlens must end at the rows of tokens \(2120\), got 20"),
        ({"token_mask": torch.ones(1, sum(N), dtype=torch.bool)}, "token_mask must be None beside cu_seqlens"),
    ],
)  # fmt: skip
def test_bad_inputs_of_certified_steps_are_named(kwargs, message):
    given = {"representatives": [ops.Representatives(GUESS.float())] * 6, "cu_seqlens": CU, **kwargs}
    with pytest.raises(ValueError, match=message):
        ops.certified_cbsa(TOKENS, given.pop("representatives"), fraction=0.5, **given)
