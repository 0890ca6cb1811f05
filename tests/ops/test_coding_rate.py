import pytest
import torch

from cbsa_torch import ops
from tests.helpers import golden
from tests.helpers.compare import assert_close


def by_hand(x, eps):
    """Eq. 1 as printed, for columns."""
    x = x.T
    q, n = x.shape
    return 0.5 * torch.logdet(torch.eye(n).double() + q / (n * eps**2) * x.T @ x)


@pytest.mark.parametrize(("n", "q"), [(7, 3), (3, 7), (5, 5), (1, 4), (4, 1)], ids=str)
def test_either_side_gives_the_rate_of_eq_1(n, q):
    x = torch.randn(2, 3, n, q).double()
    rate = ops.coding_rate(x, eps=0.5)
    assert rate.shape == (2, 3)
    for b in range(2):
        for h in range(3):
            assert_close(rate[b, h], by_hand(x[b, h], 0.5), 1e-12)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_agrees_with_the_official_measurement(case):
    data, description = golden.load("coding_rate")
    rate = ops.compression_rate(data[f"x{case}"], eps=description["eps"] ** 0.5)
    assert_close(rate.mean()[None], data[f"mean{case}"], 1e-5)
    # the official numbers are float32: their spread is as exact as their mean
    assert (rate.std() - data[f"std{case}"]).abs() <= 2e-6 * data[f"mean{case}"]


def test_normalised_rate_ignores_length_and_keeps_zero():
    x = torch.randn(2, 6, 4).double()
    scaled = x * torch.rand(2, 6, 1).double().add(0.1)
    assert_close(ops.coding_rate(x, normalize=True), ops.coding_rate(scaled, normalize=True), 1e-12)
    unit = torch.nn.functional.normalize(x, dim=-1)
    assert_close(ops.coding_rate(x, normalize=True), ops.coding_rate(unit), 1e-12)
    assert ops.coding_rate(torch.zeros(2, 6, 4), normalize=True).abs().max() == 0


def test_compression_rate_sums_over_subspaces_and_reduction_subtracts_it():
    z = torch.randn(2, 9, 6).double()
    projected = z.unflatten(-1, (3, 2)).transpose(1, 2)
    per_head = ops.coding_rate(projected)
    assert_close(ops.compression_rate(projected), per_head.sum(1), 1e-12)
    expected = ops.coding_rate(z) - per_head.sum(1)
    assert_close(ops.rate_reduction(z, projected), expected, 1e-12)


def test_masked_vectors_do_not_count():
    x = torch.randn(3, 2, 8, 5).double()
    mask = torch.arange(8) < torch.tensor([[8], [3], [0]])
    poisoned = x.masked_fill(~mask[:, None, :, None], float("nan"))
    rate = ops.coding_rate(poisoned, token_mask=mask)
    assert_close(rate[1:2], ops.coding_rate(x[1:2, :, :3]), 1e-12)
    assert rate[2].abs().max() == 0


def test_gradcheck_and_gradient_of_eq_7():
    x = torch.randn(2, 4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.coding_rate(x, eps=0.6), x)
    (gradient,) = torch.autograd.grad(ops.coding_rate(x, eps=0.6).sum(), x)
    alpha = 3 / (4 * 0.6**2)
    expected = alpha * torch.linalg.solve(torch.eye(4).double() + alpha * x @ x.mT, x)
    assert_close(gradient, expected.detach(), 1e-12)


def test_nan_rather_than_a_wrong_number_beyond_float64():
    x = torch.randn(8).double().expand(6, 8)  # rank one
    assert torch.isfinite(ops.coding_rate(1e3 * x))
    assert ops.coding_rate(1e12 * x).isnan()


def test_dtypes():
    x = torch.randn(5, 3)
    assert ops.coding_rate(x.bfloat16()).dtype == torch.float32
    assert ops.coding_rate(x.double()).dtype == torch.float64
    with torch.autocast("cpu"):
        assert_close(ops.coding_rate(x), ops.coding_rate(x.double()).float(), 1e-6)


X, MASK = torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "kind", "message"),
    [
        (ops.coding_rate, [X[0, 0]], {}, ValueError, r"x must have shape \(..., N, q\)"),
        (ops.coding_rate, [X[:, :0]], {}, ValueError, "at least one vector"),
        (ops.coding_rate, [X.int()], {}, TypeError, "x must have a floating"),
        (ops.coding_rate, [X], {"eps": -1}, ValueError, "eps must be positive"),
        (ops.coding_rate, [X[0]], {"token_mask": MASK}, ValueError, "x must have a batch axis"),
        (
            ops.coding_rate,
            [X],
            {"token_mask": MASK.float()},
            TypeError,
            "token_mask must have dtype torch.bool",
        ),
        (ops.compression_rate, [X[0]], {}, ValueError, "projected must have shape"),
        (ops.compression_rate, [X[:, :0]], {}, ValueError, "projected must have shape"),
        (ops.compression_rate, [X], {"token_mask": MASK}, ValueError, "projected must have a batch axis"),
        (ops.rate_reduction, [X, X[:, None, :2]], {}, ValueError, "the same leading axes and N"),
    ],
)
def test_bad_input_is_named(function, arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        function(*arguments, **options)
