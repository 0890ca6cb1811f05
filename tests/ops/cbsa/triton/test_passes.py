"""The Triton kernels, in Triton's interpreter if there is no GPU, against the eager operator in float64."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from cbsa_torch import ops
from cbsa_torch.ops.cbsa.library import cbsa_backward_op, cbsa_op
from cbsa_torch.ops.cbsa.reference import broadcast, contract_exact, contract_softmax, extract
from cbsa_torch.ops.cbsa.triton import passes
from cbsa_torch.ops.cbsa.triton.passes import plan
from tests.helpers.compare import assert_close, relative_error
from tests.helpers.operator import CONTRACTIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
TOLERANCE_EXACT = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
EPS = 0.5
NOTHING = (None,) * 6
"""For projection, bias, and the weights of initial guesses: a matrix or cells."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # tests/conftest.py turns the interpreter on


@pytest.fixture(autouse=True)
def _device():
    with torch.device(DEVICE):
        yield


@pytest.fixture
def many_splits(monkeypatch):
    monkeypatch.setattr(passes, "SHORTEST_SPAN", 32)
    monkeypatch.setattr(passes, "_processors", lambda device: 16)


def problem(b=2, h=2, n=70, m=7, p=20, dtype=torch.float32, separate=False, size=1.0):
    shapes = {"representatives": (b, h, m, p), "keys": (b, h, n, p), "values": (b, h, n, p)}
    rows = {name: (size * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}
    if not separate:
        rows["values"] = None
    eta, kappa = 1 + torch.rand(h), torch.randn(h)
    return {**rows, "step_representatives": eta, "step_tokens": kappa}


def evaluate(function, tensors, gradient, dtype=None):
    """Output and gradients of ``function``, by name, in float64; inputs as they are or in ``dtype``."""
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
        for name, t in tensors.items()
    }
    output = function(**leaves)
    given = {name: t for name, t in leaves.items() if t is not None}
    found = torch.autograd.grad(output, list(given.values()), gradient.to(output.dtype))
    results = {"output": output.detach(), **dict(zip(given, found, strict=True))}
    return {name: t.double() for name, t in results.items()}


def by_kernels(contraction="softmax", key_mask=None, representative_mask=None):
    def f(representatives, keys, values, step_representatives, step_tokens):
        scale = keys.shape[-1] ** -0.5
        steps = step_representatives, step_tokens
        masks = key_mask, representative_mask
        return cbsa_op(
            representatives, keys, values, *steps, *masks, *NOTHING, contraction, scale, EPS, "triton"
        )[0]

    return f


def by_equations(contraction="softmax", key_mask=None, representative_mask=None):
    def f(representatives, keys, **others):
        masks = {"token_mask": key_mask, "representative_mask": representative_mask}
        return ops.cbsa(
            keys, representatives, impl="eager", contraction=contraction, eps=EPS, **masks, **others
        )

    return f


def in_its_own_dtype(contraction):
    """The equations with every intermediate in the dtype of the inputs, as a plain layer would compute."""

    def f(representatives, keys, values, step_representatives, step_tokens):
        eta, kappa = (s.to(keys.dtype)[:, None, None] for s in (step_representatives, step_tokens))
        scale = keys.shape[-1] ** -0.5
        attention, picked = extract(representatives, keys, keys if values is None else values, scale)
        c = representatives + eta * picked
        if contraction == "softmax":
            c = contract_softmax(c, scale)[1]
        elif contraction == "exact":
            c = contract_exact(c, EPS)
        return broadcast(attention.mT, c, kappa)

    return f


def assert_agree(found, expected, tolerance):
    for name, value in expected.items():
        # gradients of step sizes are sums of terms that cancel
        allowed = 5 * tolerance if name.startswith("step") else tolerance
        error = relative_error(found[name], value)
        assert error <= allowed, f"{name}: relative error {error:.3g} > {allowed:.3g}"


def check(tensors, dtype, contraction="softmax", **masks):
    gradient = torch.randn_like(tensors["keys"])
    found = evaluate(by_kernels(contraction, **masks), tensors, gradient)
    expected = evaluate(by_equations(contraction, **masks), tensors, gradient, torch.float64)
    assert_agree(found, expected, (TOLERANCE_EXACT if contraction == "exact" else TOLERANCE)[dtype])
    return found, expected, gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("contraction", "separate"), [("softmax", False), ("exact", True), ("none", True)])
def test_equals_the_equations(dtype, contraction, separate):
    tensors = problem(dtype=dtype, separate=separate, n=150, p=16)
    found, expected, gradient = check(tensors, dtype, contraction)
    if dtype in HALVES:
        plain = evaluate(in_its_own_dtype(contraction), tensors, gradient, dtype)
        for name in ("output", "representatives", "keys"):
            bound = 2 * relative_error(plain[name], expected[name])
            assert relative_error(found[name], expected[name]) <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # float16 takes the same blocks
@pytest.mark.parametrize(
    ("n", "m", "p"),
    [
        (1, 7, 5),
        (31, 1, 48),
        (32, 40, 20),
        (33, 17, 16),
        (63, 16, 1),
        (64, 64, 64),
        (65, 100, 80),
        (9, 200, 128),
    ],
    ids=str,
)
def test_sizes_that_fit_no_block(dtype, n, m, p):
    check(problem(b=1, h=2, n=n, m=m, p=p, dtype=dtype, separate=n == 33), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_changes_nothing_whatever_it_holds(many_splits, dtype):
    """Items of several lengths, one of them empty, one padded in front; NaN where no token is."""
    tensors = problem(b=4, h=1, n=70, dtype=dtype, separate=True)
    place = torch.arange(70)
    mask = torch.stack([place < 70, place < 3, place < 0, (place >= 40) & (place % 3 != 0)])
    for name in ("keys", "values"):
        tensors[name] = tensors[name].masked_fill(~mask[:, None, :, None], float("nan"))
    found, _, gradient = check(tensors, dtype, key_mask=mask)
    for name in ("output", "keys", "values"):
        assert (found[name].mT[(~mask)[:, None, None].expand_as(found[name].mT)] == 0).all()
    assert found["representatives"][2].abs().max() == 0
    gradient = gradient.masked_fill(~mask[:, None, :, None], float("nan"))
    again = evaluate(by_kernels(key_mask=mask), tensors, gradient)
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_masked_representatives_do_not_exist(contraction):
    tensors = problem(b=2, m=6)
    mask = torch.tensor([[True, False, True, True, False, False], [False] * 6])
    poisoned = tensors["representatives"].masked_fill(~mask[:, None, :, None], float("nan"))
    found, _, _ = check(
        {**tensors, "representatives": poisoned}, torch.float32, contraction, representative_mask=mask
    )
    assert found["representatives"].mT[(~mask)[:, None, None].expand(2, 2, 20, 6)].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_agree_with_one_sweep_and_two_runs_in_every_bit(monkeypatch, dtype):
    tensors = problem(b=1, h=1, n=130, m=20, dtype=dtype)
    gradient = torch.randn_like(tensors["keys"])
    once = evaluate(by_kernels(), tensors, gradient)
    monkeypatch.setattr(passes, "SHORTEST_SPAN", 64)
    monkeypatch.setattr(passes, "_processors", lambda device: 16)
    assert plan(1, 20, 130, 20, dtype, 16).splits == 2
    first, second = (evaluate(by_kernels(), tensors, gradient) for _ in range(2))
    assert_agree(first, once, TOLERANCE[dtype] / 2)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    """Tokens cut from (B, N, H * P), one learned set of representatives for all items, an expanded gradient."""
    storage = torch.randn(3, 41, 2, 24).to(dtype)
    keys = storage[::2, 1:].transpose(1, 2)[..., 2:22]  # (2, 2, 40, 20)
    values = torch.randn(2, 2, 20, 40).to(dtype).mT
    learned = torch.randn(2, 7, 20).to(dtype).requires_grad_()
    steps = torch.ones(2), torch.ones(2)
    function, options = by_kernels(), (*NOTHING, "softmax", 20**-0.5, EPS, "triton")
    output = cbsa_op(learned.expand(2, -1, -1, -1), keys, values, *steps, None, None, *options)[0]
    (found,) = torch.autograd.grad(output.sum(), learned)
    assert output.transpose(1, 2).is_contiguous()
    copies = (t.contiguous() for t in (learned.expand(2, -1, -1, -1), keys, values))
    assert torch.equal(output, function(*copies, *steps))
    wide = learned.detach().double().requires_grad_()
    expected = by_equations()(wide.expand(2, -1, -1, -1), keys.double(), values=values.double())
    assert_close(output.double(), expected, TOLERANCE[dtype])
    assert_close(found.double(), torch.autograd.grad(expected.sum(), wide)[0], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits_stay_finite(many_splits, dtype):
    """Logits of 1e4, of either sign, where the softmax picks one token; in sums of such logits fp32 errs by 1e-3."""
    tensors = problem(b=1, n=70, dtype=dtype, size=70.0)
    gradient = torch.randn_like(tensors["keys"])
    found = evaluate(by_kernels(), tensors, gradient)
    expected = evaluate(by_equations(), tensors, gradient, torch.float64)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert_close(found["output"], expected["output"], 1e-2)
    low = tensors | {name: tensors[name].abs() + 70 for name in ("keys", "representatives")}
    low["representatives"] *= -1
    assert all(torch.isfinite(value).all() for value in evaluate(by_kernels(), low, gradient).values())


@pytest.mark.parametrize("size", [1e-6, 1e4], ids=str)
def test_float16_gradients_of_steps_keep_their_range(size):
    """Their terms are far below and far above what the gradients of float16 tokens can hold."""
    tensors = problem(n=200, m=16, dtype=torch.float16)
    gradient = (size * torch.randn(2, 2, 200, 20)).half()
    steps = {name: tensors[name].clone().requires_grad_() for name in ("step_representatives", "step_tokens")}
    output = by_kernels()(**{**tensors, **steps})
    found = torch.autograd.grad(output, list(steps.values()), gradient)
    expected = evaluate(by_equations(), tensors, gradient, torch.float64)
    for value, name in zip(found, steps, strict=True):
        assert_close(value.double(), expected[name], 2e-2)


@pytest.mark.parametrize(("eta", "kappa", "size"), [(1.0, 5e4, 1e-3), (1e5, 1.0, 1.0)], ids=str)
def test_float16_operands_outside_their_range(eta, kappa, size):
    """The products kappa C, then eta dRep, exceed 65504; no result does."""
    tensors = problem(n=200, m=16, dtype=torch.float16)
    tensors |= {"step_representatives": torch.full((2,), eta), "step_tokens": torch.full((2,), kappa)}
    gradient = (size * torch.randn(2, 2, 200, 20)).half()
    found = evaluate(by_kernels("none"), tensors, gradient)
    expected = evaluate(by_equations("none"), tensors, gradient, torch.float64)
    assert max(value.abs().max() for name, value in expected.items() if not name.startswith("step")) < 65504
    assert_agree(found, expected, TOLERANCE[torch.float16])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_results_are_rounded_to_nearest_even(dtype):
    """One token takes the plain sum of the representatives."""
    pair = torch.randn(2, 2, 2, 20).to(dtype)
    steps = torch.zeros(2), torch.ones(2)
    output = by_kernels("none")(pair, torch.randn(2, 2, 1, 20).to(dtype), None, *steps)
    assert torch.equal(output, pair.float().sum(2, keepdim=True).to(dtype))


def test_nan_in_a_real_token_shows():
    tensors = problem()
    tensors["keys"][0, 0, 2, 1] = float("nan")
    output = by_kernels()(**tensors)
    assert output[0, 0].isnan().all()
    assert torch.isfinite(output[1]).all()


# A device context hides from torch that it looks at .grad on purpose.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_keep_their_contracts():
    """Fake tensors, aliasing, autograd; and what is returned is what ``tiled`` returns."""
    tensors = problem(b=1, h=1, n=9, m=3, p=4, separate=True)
    leaves = [None if t is None else t.requires_grad_() for t in tensors.values()]
    mask, options = torch.ones(1, 9, dtype=torch.bool), (None, *NOTHING, "softmax", 0.5, EPS)
    arguments = (*leaves, mask, *options, "triton")
    torch.library.opcheck(cbsa_op, arguments)
    returned, expected = cbsa_op(*arguments), cbsa_op(*leaves, mask, *options, "tiled")
    for ours, theirs in zip(returned[:2], expected[:2], strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        assert_close(ours.detach(), theirs.detach(), 1e-5)
    detached = [None if t is None else t.detach() for t in leaves]
    saved = [t.detach() for t in returned]
    torch.library.opcheck(cbsa_backward_op, (*saved, *detached, mask, *options, "triton"))


@pytest.mark.parametrize("gradients", [False, True])
def test_the_plan_covers_everything_once(gradients):
    for n in (1, 31, 64, 2047, 2049, 16384, 1 << 20):
        for m, p, problems in ((1, 1, 1), (49, 64, 96), (100, 80, 6), (256, 128, 3000)):
            for dtype in DTYPES:
                chosen = plan(problems, m, n, p, dtype, 132, gradients)
                assert chosen.blocks * chosen.block_m >= m > (chosen.blocks - 1) * chosen.block_m
                assert chosen.splits * chosen.span >= n > (chosen.splits - 1) * chosen.span
                assert chosen.span % chosen.block_n == 0
                assert chosen.block_p >= p


def test_what_kernels_cannot_take_is_named(monkeypatch):
    good = problem()
    with pytest.raises(TypeError, match="float32, float16 or bfloat16, got torch.float64"):
        by_kernels()(**{name: None if t is None else t.double() for name, t in good.items()})
    with pytest.raises(ValueError, match="head dimension of at most 128, got 129"):
        by_kernels()(**problem(p=129))
    with pytest.raises(ValueError, match="at most 256 representatives, got 257"):
        by_kernels()(**problem(m=257))
    monkeypatch.setattr(passes, "_interpreted", lambda: False)
    with torch.device("cpu"), pytest.raises(ValueError, match="CUDA device, got tensors on cpu"):
        by_kernels()(**problem())


def test_kernels_compile_without_spilling(tmp_path):
    """For an H100, in a process without the interpreter; the other kernels are made of the same parts."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.helpers.compile_kernels", "90", "extract", "gradients"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert [kernel["kernel"] for kernel in compiled] == ["extract", "gradients"]
    assert all(kernel["spilled"] == 0 for kernel in compiled), compiled
