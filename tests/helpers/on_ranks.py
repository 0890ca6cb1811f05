"""Checks that several processes make together, each on its slice of the tokens: the ``main`` of processes.run."""

import contextlib
import datetime
from functools import partial

import torch
import torch.distributed as dist

from cbsa_torch import ops
from cbsa_torch.models import WhiteBoxTransformer
from cbsa_torch.nn import CBSA, TSSA, AgentAttention, LinearCBSA
from cbsa_torch.parallel import ContextParallel, ImageBand, context_parallel, pixel_rows
from tests.helpers.compare import assert_close

DIM, HEADS, GRID, PREFIX = 12, 3, (7, 5), 2
N = PREFIX + GRID[0] * GRID[1]


def main(names):
    """Make the checks of these names, one after the other, in one group of processes."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    for name in names:
        torch.manual_seed(0)
        globals()[f"check_{name}"](dist.group.WORLD)
    dist.destroy_process_group()


def mixers():
    pool = partial(CBSA, DIM, HEADS, num_representatives=6)
    return {
        "softmax": pool(),
        "exact": pool(contraction="exact", eps=0.8),
        "none": pool(contraction="none"),
        "separate": pool(qkv="separate"),
        "scale norm": pool(scale_norm=True, norm_layer=torch.nn.LayerNorm),
        "official": pool(layout="official", num_prefix_tokens=PREFIX),
        "as many as tokens": CBSA(DIM, HEADS, num_representatives=64),
        "recomputed": pool(recompute=True),
        "tiled": pool(impl="tiled"),
        "tiled separate": pool(impl="tiled", qkv="separate"),
        "certified": pool(step="certified"),
        "certified tiled": pool(step="certified", impl="tiled"),
        "certified learned": pool(step="certified", representatives="learned"),
        "learned": pool(representatives="learned"),
        "agent": AgentAttention(DIM, HEADS, num_representatives=6),
        "agent shared": AgentAttention(DIM, HEADS, num_representatives=6, qkv="shared"),
        "linear": LinearCBSA(DIM, HEADS),
        "linear eigh sum": LinearCBSA(DIM, HEADS, solver="eigh", average=False),
        "tssa": TSSA(DIM, HEADS),
        "channel": TSSA(DIM, HEADS, form="channel"),
        "channel sum": TSSA(DIM, HEADS, form="channel", average=False),
    }


def partitions(size):
    """Ways to spread N tokens: about equal, ragged, and with empty ranks."""
    equal = [N * (i + 1) // size - N * i // size for i in range(size)]
    ragged = [1, *[3] * (size - 2), N - 1 - 3 * (size - 2)]
    return [tuple(equal), tuple(ragged), (*[0] * (size - 1), N), (N, *[0] * (size - 1))]


def masks():
    """None, and one with an item without real tokens, a prefix token that is masked, and a ragged border."""
    real = torch.rand(3, N) > 0.3
    real[0, PREFIX + 20 :] = False
    real[1] = False
    return [None, real]


def differentiated(module, x, cotangent, *args, **kwargs):
    """Output, gradient of the input, and of every parameter by name."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    out = module(x, *args, **kwargs)
    out.backward(cotangent)
    return out.detach(), x.grad, {name: p.grad for name, p in module.named_parameters()}


def close(actual, expected, tolerance):
    """assert_close of tensors that may be empty."""
    assert actual.shape == expected.shape
    if actual.numel():
        assert_close(actual, expected, tolerance)


def summed(gradient):
    total = gradient.clone()
    dist.all_reduce(total)
    return total


def check_mixers(group):
    """Outputs and all gradients are those of one process."""
    torch.set_default_dtype(torch.float64)
    for name, mixer in mixers().items():
        for mask in masks():
            x, cotangent = torch.randn(3, N, DIM), torch.randn(3, N, DIM)
            if mask is not None:
                x = x.masked_fill(~mask[..., None], float("nan"))
            expected = differentiated(mixer, x, cotangent, GRID, mask)
            for lengths in partitions(group.size()):
                assert_as_one(name, mixer, expected, x, cotangent, mask, lengths, group, grid_size=GRID)


def assert_as_one(name, module, expected, x, cotangent, mask, lengths, group, **given):
    parallel = ContextParallel(group, lengths)
    here = slice(parallel.start, parallel.start + parallel.length)
    own = None if mask is None else mask[:, here]
    actual = differentiated(module, x[:, here], cotangent[:, here], token_mask=own, parallel=parallel, **given)
    with note(f"{name} on {lengths}, rank {parallel.rank}, {'no ' if mask is None else ''}mask"):
        for own, whole in zip(actual[:2], expected[:2], strict=True):
            close(own, whole[:, here], 1e-10)
        for parameter, gradient in expected[2].items():
            assert_close(summed(actual[2][parameter]), gradient, 1e-10)


@contextlib.contextmanager
def note(text):
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{text}: {error}") from error


def check_coordinates(group):
    """Cells are those of all tokens."""
    torch.set_default_dtype(torch.float64)
    for name in ("softmax", "certified", "agent"):
        mixer = mixers()[name]
        x, cotangent = torch.randn(2, N, DIM), torch.randn(2, N, DIM)
        coords = torch.rand(2, N - PREFIX, 2)
        expected = differentiated(mixer, x, cotangent, coords=coords)
        for lengths in partitions(group.size()):
            assert_as_one(name, mixer, expected, x, cotangent, None, lengths, group, coords=coords)


def check_operator(group):
    """What layers do not use: a fresh softmax to broadcast, keys of another length, a 1-D and a 3-D grid."""
    torch.set_default_dtype(torch.float64)
    lengths = partitions(group.size())[1]
    parallel = ContextParallel(group, lengths)
    here = slice(parallel.start, parallel.start + parallel.length)
    b, h, p, m = 2, 2, 3, 4
    tokens, rep = torch.randn(b, h, N, p), torch.randn(b, h, m, p)
    for options in ({}, {"contraction": "exact"}, {"broadcast": "softmax"}):
        real = torch.rand(b, N) > 0.4
        real[1] = False
        mask = {"token_mask": real}
        expected = ops.cbsa(tokens, rep, step_representatives=0.7, **options, **mask)
        own = {"token_mask": real[:, here], "parallel": parallel}
        actual = ops.cbsa(tokens[:, :, here], rep, step_representatives=0.7, **options, **own)
        close(actual, expected[:, :, here], 1e-12)
    count = ContextParallel(group, tuple(24 if r == 1 else 0 for r in range(group.size())))
    keys = torch.randn(b, h, 24, p)
    part = keys[:, :, 12 * (parallel.rank) : 12 * (parallel.rank + 1)]  # ranks 2, 3: none
    rows = tokens[:, :, :24]
    expected = ops.cbsa(rows, rep, keys=keys, broadcast="softmax")
    own = rows if parallel.rank == 1 else rows[:, :, :0]
    actual = ops.cbsa(own, rep, keys=part, broadcast="softmax", parallel=count)
    close(actual, expected if parallel.rank == 1 else expected[:, :, :0], 1e-12)
    for grid in ((N,), (3, 2, 6)):
        for number in (5, 1, 1000):
            size = torch.Size(grid).numel()
            expected = ops.pool_representatives(tokens[:, :, N - size :], grid, number)
            first = {"num_prefix_tokens": N - size, "parallel": parallel}
            actual = ops.pool_representatives(tokens[:, :, here], grid, number, **first)
            close(actual.values, expected.values, 1e-12)


def whitebox(**options):
    mixer = options.pop("mixer", partial(CBSA, num_representatives=4))
    sizes = {"img_size": (64, 48), "num_classes": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return WhiteBoxTransformer(**{**sizes, "mixer": mixer, **options})


def models():
    """Models, and sizes of images that they get: such that a rank of four has nothing, among others."""
    return {
        "conv": (whitebox(), (70, 52)),
        "conv of few rows": (whitebox(), (33, 48)),
        "stride 1": (whitebox(patch_size=1, img_size=7), (7, 5)),
        "average": (whitebox(patch_size=8, global_pool="avg"), (30, 41)),
        "maximum": (whitebox(patch_size=2, global_pool="avgmax"), (11, 9)),
        "linear stem": (whitebox(stem="linear"), (80, 48)),
        "certified": (whitebox(mixer=partial(CBSA, num_representatives=4, step="certified")), (64, 48)),
        "mlp, mixed": (whitebox(mlp_ratio=2.0, mixer=[TSSA, LinearCBSA]), (64, 48)),
    }


def check_models(group):
    """Logits, all gradients and batch norm's statistics are those of one process that has the whole image."""
    torch.set_default_dtype(torch.float64)
    rank, size = group.rank(), group.size()
    for name, (model, img_size) in models().items():
        for training in (True, False):
            model.train(training).set_grad_checkpointing(name == "conv")
            state = {key: value.clone() for key, value in model.state_dict().items()}
            images, cotangent = torch.randn(2, 3, *img_size), torch.randn(2, 3)
            context_parallel(model, None)
            expected = differentiated(model, images, cotangent)
            statistics = {key: value.clone() for key, value in model.state_dict().items()}
            model.load_state_dict(state)
            context_parallel(model, group)
            actual = differentiated(model, images, cotangent)
            with note(f"{name}, rank {rank}, training {training}"):
                close(actual[0], expected[0], 1e-10)
                close(summed(actual[1]) / size, expected[1], 1e-10)
                for parameter, gradient in expected[2].items():
                    with note(parameter):
                        close(summed(actual[2][parameter]) / size, gradient, 1e-10)
                for key, value in statistics.items():
                    close(model.state_dict()[key].double(), value.double(), 1e-10)
                rows = pixel_rows(model, img_size)
                band = ImageBand(images[:, :, rows], img_size[0])
                model.load_state_dict(state)
                assert torch.equal(model(band), actual[0])
                _, features = model.forward_intermediates(images)
                assert sum(counts(features[0].shape[2], size)) == model.stem.grid_size(img_size)[0]


def counts(own, size):
    told = [None] * size
    dist.all_gather_object(told, own)
    return told
