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
