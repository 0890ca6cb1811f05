"""Checks that several processes make together, each on its slice of the tokens: the ``main`` of processes.run."""

import contextlib
import copy
import datetime
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from cbsa_torch import ops
from cbsa_torch.models import TokenSetTransformer, WhiteBoxTransformer
from cbsa_torch.nn import CBSA, MSSA, TSSA, AgentAttention, Coordinates, LinearCBSA
from cbsa_torch.ops.parallel import merged, total
from cbsa_torch.parallel import (
    ContextParallel,
    ContextParallelStyle,
    ImageBand,
    SetSlice,
    context_parallel,
    pixel_rows,
)
from cbsa_torch.train.engine.accelerate import synchronize_batch_norm
from tests.helpers.compare import assert_close

DIM, HEADS, GRID, PREFIX = 12, 3, (7, 5), 2
N = PREFIX + GRID[0] * GRID[1]


def main(names):
    """Make the checks of these names, one after the other, in one group of processes."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for name in names:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
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
        "relative": pool(step="relative"),
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


def check_compiled(group):
    """Layers compile as a whole, exchanges and all; what is exchanged in place is not what is needed afterwards."""
    compiled_layers(group, ["softmax"], "aot_eager", partitions(group.size())[2:3])
    parallel = ContextParallel(group, partitions(group.size())[0])

    def exchanged(x):
        a = x.sin()
        summed_up = total(torch.cat([a, x.cos()], -1), group)
        share, picked, _ = merged(summed_up[..., 0], a, parallel)
        return share * picked * summed_up[..., :5]

    x, cotangent = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    found = []
    for function in (exchanged, torch.compile(exchanged, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        out.backward(cotangent)
        found.append((out, leaf.grad))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_close(actual, expected, 1e-12)


def check_compiled_mixers(group):
    """Compiled for the CPU, on ranks with a token and with the others, and with none."""
    compiled_layers(group, ["softmax", "tssa"], "inductor", partitions(group.size())[1:3])


def compiled_layers(group, names, backend, partitions):
    torch.set_default_dtype(torch.float64)
    for name in names:
        mixer = mixers()[name]
        compiled = torch.compile(mixer, backend=backend, fullgraph=True, dynamic=False)
        for mask in masks():
            for lengths in partitions:
                parallel = ContextParallel(group, lengths)
                here = slice(parallel.start, parallel.start + parallel.length)
                x, own = torch.randn(3, N, DIM)[:, here], None if mask is None else mask[:, here]
                cotangent = torch.randn(3, N, DIM)[:, here]
                expected, actual = (
                    differentiated(m, x, cotangent, GRID, own, parallel=parallel) for m in (mixer, compiled)
                )
                with note(f"{name} on {lengths}, rank {parallel.rank}, {'no ' if mask is None else ''}mask"):
                    same_gradients(actual, expected)


def same_gradients(actual, expected):
    """Those of a compiled module and of the module itself."""
    close(actual[0], expected[0], 1e-12)
    close(actual[1], expected[1], 1e-12)
    for name, gradient in expected[2].items():
        with note(name):
            close(actual[2][f"_orig_mod.{name}"], gradient, 1e-12)


def check_compiled_models(group):
    """In parts: ranks first agree on what they were given. Of two sizes, each compiled; trained and evaluated."""
    torch.set_default_dtype(torch.float64)
    for model in (whitebox(), token_set(recompute=True)):
        context_parallel(model, group)
        compiled = torch.compile(model, backend="aot_eager", dynamic=False)
        for training in (True, False):
            model.train(training)
            for n in (9, 12):
                torch.manual_seed(n)
                x, given = torch.randn(2, n, 7), {"coords": torch.rand(2, n, 2)}
                if isinstance(model, WhiteBoxTransformer):
                    x, given = torch.randn(2, 3, 8 * n, 48), {}
                found = []
                for called in (model, compiled):
                    torch.manual_seed(group.rank())
                    found.append(differentiated(called, x, torch.ones(2, 3), **given))
                same_gradients(found[1], found[0])


def check_coordinates(group):
    """Cells are those of all tokens, of those that are real."""
    torch.set_default_dtype(torch.float64)
    for name in ("softmax", "relative", "certified", "agent"):
        mixer = mixers()[name]
        for mask in masks():
            x, cotangent = torch.randn(3, N, DIM), torch.randn(3, N, DIM)
            coords = torch.rand(3, N - PREFIX, 2)
            if mask is not None:
                x, coords = (t.masked_fill(~mask[:, -t.shape[1] :, None], torch.nan) for t in (x, coords))
            expected = differentiated(mixer, x, cotangent, token_mask=mask, coords=coords)
            places = Coordinates(coords, None if mask is None else mask[:, PREFIX:])
            for lengths in partitions(group.size()):
                assert_as_one(name, mixer, expected, x, cotangent, mask, lengths, group, coords=places)
    parallel = ContextParallel(group, partitions(group.size())[0])
    here, real = slice(parallel.start, parallel.start + parallel.length), torch.rand(3, N) > 0.3
    with pytest.raises(ValueError, match="must be given together"):
        mixer(x[:, here], token_mask=real[:, here], coords=coords, parallel=parallel)
    with pytest.raises(ValueError, match="token_mask must be the part of this rank"):
        places = Coordinates(coords, real[:, PREFIX:])
        mixer(x[:, here], token_mask=~real[:, here], coords=places, parallel=parallel)
    with pytest.raises(ValueError, match="no token_mask of their own without parallel"):
        mixer(x, coords=places)


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


def token_set(mixer="cbsa", **options):
    sizes = {"num_classes": 3, "dim": 16, "depth": 2, "num_heads": 2, "num_representatives": 5}
    if mixer not in ("cbsa", "agent"):
        del sizes["num_representatives"]
    return TokenSetTransformer(7, mixer=mixer, **{**sizes, **options})


def sets():
    """Models of sets."""
    return {
        "relative": token_set(),
        "recomputed": token_set(recompute=True, positions="fourier"),
        "certified": token_set(step="certified"),
        "agent": token_set("agent"),
        "linear": token_set("linear_cbsa", positions="none"),
        "learned, mlp": token_set(representatives="learned", mlp_ratio=2.0, positions="none"),
    }


def check_sets(group):
    """Logits and all gradients are those of one process, of whole sets and of slices, ragged and empty ones."""
    torch.set_default_dtype(torch.float64)
    rank, size, n = group.rank(), group.size(), 23
    ragged = [0, 1, *[1 + 2 * r for r in range(1, size - 1)], n]
    for name, model in sets().items():
        for mask in (None, torch.rand(2, n) > 0.4):
            features, coords, cotangent = torch.randn(2, n, 7), torch.rand(2, n, 2), torch.randn(2, 3)
            if mask is not None:
                features, coords = (t.masked_fill(~mask[..., None], torch.nan) for t in (features, coords))
            given = {"coords": coords if model.needs_coords else None, "token_mask": mask}
            context_parallel(model, None)
            expected = differentiated(model, features, cotangent, **given)
            context_parallel(model, group)
            for bounds in (None, ragged, [0, *[n] * size], [*[0] * size, n]):
                with note(f"{name}, rank {rank}, bounds {bounds}, {'no ' if mask is None else ''}mask"):
                    if bounds is None:
                        actual = differentiated(model, features, cotangent, **given)
                        close(summed(actual[1]) / size, expected[1], 1e-10)
                    else:
                        model.zero_grad()
                        own = features[:, bounds[rank] : bounds[rank + 1]].clone().requires_grad_()
                        out = model(SetSlice(own), **given)
                        out.backward(cotangent)
                        grads = {key: p.grad for key, p in model.named_parameters()}
                        actual = out.detach(), own.grad, grads
                        close(own.grad / size, expected[1][:, bounds[rank] : bounds[rank + 1]], 1e-10)
                    close(actual[0], expected[0], 1e-10)
                    for parameter, gradient in expected[2].items():
                        with note(parameter):
                            close(summed(actual[2][parameter]) / size, gradient, 1e-10)


def counts(own, size):
    told = [None] * size
    dist.all_gather_object(told, own)
    return told


# ---- what is exchanged


@contextlib.contextmanager
def counted():
    """The numbers that this rank contributes to each exchange, in order."""
    found, originals = [], {}

    def count(name, position):
        original = originals[name] = getattr(dist, name)

        def wrapped(*args, **kwargs):
            found.append(args[position].numel())
            return original(*args, **kwargs)

        setattr(dist, name, wrapped)

    count("all_reduce", 0)
    count("all_gather", 1)
    count("all_gather_object", 1)
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def check_exchanges(group):
    """Their number and size, which are independent of N."""
    b, m = 3, 6
    c, h, p = DIM, HEADS, DIM // HEADS
    most = {  # numbers per item: forward, backward
        "softmax": ([m * c, m * (c + h)], [m * (c + h), m * c]),
        "separate": ([m * c, m * (c + h)], [m * (c + h), m * c]),
        "tiled": ([m * c, m * (c + h)], [m * (c + h), m * c]),
        "exact": ([m * c, m * (c + h)], [m * (c + h), m * c]),
        "relative": ([m * c, m * (c + h)], [m * (c + h), m * c]),
        "learned": ([m * (c + h)], [m * (c + h)]),
        "certified": ([m * c, m * (c + h) + 2 * h * m * m], [m * (c + h), m * c]),
        "agent": ([m * c, m * (c + h)], [m * (c + h), m * c]),
        "linear": ([c * p], [c * p]),
        "tssa": ([c, c + h], [c + h, c]),
        "channel": ([c], [c]),
    }
    for name, (forward, backward) in most.items():
        mixer = mixers()[name]
        for grid in ((7, 5), (14, 10), (70, 50)):
            n = PREFIX + grid[0] * grid[1]
            size = group.size()
            parallel = ContextParallel(group, tuple(n * (i + 1) // size - n * i // size for i in range(size)))
            x = torch.randn(b, parallel.length, DIM, requires_grad=True)
            with counted() as sizes:
                out = mixer(x, grid, parallel=parallel)
            assert sizes == [b * count for count in forward], name
            with counted() as sizes:
                out.sum().backward()
            assert sizes == [b * count for count in backward], name
            mask = torch.ones(b, parallel.length, dtype=torch.bool)
            with counted() as sizes:
                out = mixer(x, grid, token_mask=mask, parallel=parallel)
            assert len(sizes) <= 3, name
            with counted() as sizes:
                out.sum().backward()
            assert len(sizes) <= 2, name


# ---- errors on every rank


def check_errors(group):
    """Whatever is wrong on one rank or all, every rank raises."""
    rank, size = group.rank(), group.size()
    model = whitebox()
    for build, text in (
        (partial(whitebox, mixer=partial(CBSA, representatives="tokens")), "AllTokens.* need all tokens"),
        (partial(whitebox, mixer=MSSA), "MSSA compares every token with every other; use CBSA"),
    ):
        with pytest.raises(ValueError, match=rf"blocks.0.attn: parallel must be None.*{text}"):
            context_parallel(build(), group)
    with pytest.raises(TypeError, match="must have a _cp_plan and a method set_context_parallel"):
        context_parallel(torch.nn.Linear(2, 2), group)
    foreign = whitebox()
    foreign.blocks[1].attn = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"blocks.1.attn: Identity is no token mixer of cbsa_torch"):
        context_parallel(foreign, group)
    with pytest.raises(TypeError, match="ranks must be a DeviceMesh or a process group"):
        context_parallel(model, [0, 1])
    # what one rank alone finds, the others are told
    for failing, error, text in (
        (torch.nn.Linear(2, 2), TypeError, "must have a _cp_plan"),
        (whitebox(mixer=MSSA), ValueError, "MSSA compares every token"),
    ):
        with pytest.raises(
            error if rank == 1 else ValueError, match=("" if rank == 1 else "rank 1: .*") + text
        ):
            context_parallel(failing if rank == 1 else model, group)
    assert model.ranks is None
    grouped = whitebox()
    grouped.stem.proj[0][1] = torch.nn.GroupNorm(2, grouped.stem.proj[0][0].out_channels)
    with pytest.raises(ValueError, match="stem must have convolutions 3 x 3 with batch norms"):
        context_parallel(grouped, group)
    alone = dist.new_group([1])
    with pytest.raises(ValueError, match="ranks must be the same group on all its processes"):
        context_parallel(model, alone if rank == 1 else group)
    context_parallel(model, group)
    with pytest.raises(ValueError, match="batch size must be the same on every rank"):
        model(torch.randn(1 + (rank == 1), 3, 64, 48))
    with pytest.raises(ValueError, match="grid_size must be the same on every rank"):
        model(torch.randn(1, 3, 64 + 16 * rank, 48))
    for height, width in ((64 - rank, 48), (64, 48 - rank)):  # of one grid
        with pytest.raises(ValueError, match="image size must be the same on every rank"):
            model(torch.randn(1, 3, height, width))
    with (
        torch.set_grad_enabled(rank != 1),
        pytest.raises(ValueError, match="mode of gradients must be the same on every rank"),
    ):
        model(torch.randn(1, 3, 64, 48))
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=rank == 1),
        pytest.raises(ValueError, match="autocast must be the same on every rank"),
    ):
        model(torch.randn(1, 3, 64, 48))
    others = whitebox(), whitebox(mixer=partial(CBSA, contraction="exact" if rank == 1 else "none"))
    with torch.no_grad():
        others[0].head.bias[0] += rank
    for different in others:
        context_parallel(different, group)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"model \(weights, options\) must be the same on every rank"):
                different(torch.randn(1, 3, 64, 48))
    wrapped = DistributedDataParallel(others[0])  # which makes them the same
    assert wrapped(torch.randn(1, 3, 64, 48)).shape == (1, 3)
    with pytest.raises(ValueError, match="rank 1: .*pixels of the ImageBand must be the rows"):
        rows = pixel_rows(model, (64, 48))
        pixels = torch.randn(1, 3, 64, 48)[:, :, rows]
        model(ImageBand(pixels[:, :, 1:] if rank == 1 else pixels, 64))
    with pytest.raises(ValueError, match="rank 0: .*images must have"):
        model(torch.randn(1, 1 if rank == 0 else 3, 64, 48))
    with pytest.raises(ValueError, match="rank 0: .*not a list of images"):
        model([torch.randn(3, 64, 48), torch.randn(3, 32, 16)])
    with pytest.raises(TypeError, match="cannot be pickled; save its state_dict"):
        pickle.dumps(model)
    assert copy.deepcopy(model).ranks is model.ranks
    assert model(torch.randn(1, 3, 64, 48)).shape == (1, 3)  # and all goes on

    with pytest.raises(ValueError, match="grid_size must be the same on every rank"):
        ContextParallel.of_slice(group, 4, grid_size=(4, 2 + rank))
    assert ContextParallel.of_slice(group, 4 + rank, grid_size=(4, 2)).lengths == tuple(
        4 + r for r in range(size)
    )
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "cp"))
    assert ContextParallel.of_slice(mesh["cp"], 3).lengths == (3,) * size
    with pytest.raises(ValueError, match="one dimension of a mesh"):
        ContextParallel.of_slice(mesh, 3)
    for lengths in ((1,) * (size + 1), (0,) * size, (-1,) * size, (1.0,) * size):
        with pytest.raises(ValueError, match="lengths must hold the tokens of each"):
            ContextParallel(group, lengths)
    parallel = ContextParallel(group, (3,) * size)
    x = torch.randn(1, 3, DIM)
    with pytest.raises(ValueError, match="x must hold the 3 tokens"):
        mixers()["softmax"](x[:, 1:], (size, 3), parallel=parallel)
    with pytest.raises(ValueError, match="grid_size"):
        mixers()["softmax"](x, (size, 4), parallel=parallel)
    with pytest.raises(ValueError, match="grid_size .or coords. is needed"):
        mixers()["softmax"](x, parallel=parallel)
    with pytest.raises(ValueError, match="not a feature map"):
        mixers()["softmax"](torch.randn(1, DIM, 3, 1), parallel=parallel)
    with pytest.raises(ValueError, match="use 'tiled' or 'eager' with parallel"):
        CBSA(DIM, HEADS, impl="triton")(x, (size, 3), parallel=parallel)
    heads = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="parallel must be None beside cu_seqlens"):
        cu = torch.tensor([0, 3])
        ops.cbsa(heads, heads, cu_seqlens=cu, cu_representatives=cu, parallel=parallel)
    with pytest.raises(ValueError, match="num_prefix_tokens must be 0 without parallel"):
        ops.pool_representatives(heads, (3,), 2, num_prefix_tokens=1)
    with pytest.raises(ValueError, match="no parallel"):
        CBSA(DIM, HEADS).stages(x, (size, 3), parallel=parallel)


def check_errors_of_sets(group):
    """Whatever does not fit or differs between ranks, every rank raises."""
    rank = group.rank()
    features, coords = torch.randn(1, 9, 7), torch.rand(1, 9, 2)
    with pytest.raises(TypeError, match="features must be whole"):
        token_set()(SetSlice(features), coords)
    with pytest.raises(ValueError, match="MSSA compares every token with every other"):
        context_parallel(token_set("mssa"), group)
    model = context_parallel(token_set(), group)
    ours = rank == 1
    mask = torch.ones(1, 9, dtype=torch.bool)
    for given, text in (
        ((features, coords + ours), "coords must be the same on every rank"),
        ((features, coords, mask if ours else None), "token_mask must be the same on every rank"),
        ((features, None if ours else coords), "rank 1: ValueError: coords must be given to this model"),
        (
            (features[:, :5] if ours else features, coords),
            r"rank 1: ValueError: coords must have shape \(1, 5, 2",
        ),
        ((features[..., :5] if ours else features, coords), "rank 1: ValueError: features must be"),
        (([[1.0]] if ours else features, coords), "rank 1: TypeError: features must be"),
        ((torch.cat([features] * 2) if ours else features, coords), "rank 1: ValueError: coords"),
        ((features.double() if ours else features, coords), "dtype must be the same on every rank"),
        ((SetSlice(features), coords), "coords must be of the 18 features of all ranks"),
        ((SetSlice(features[:, :4]), coords[:, :, :1]), "coords must have shape"),
        ((features, coords.masked_fill(coords == coords.amax(), torch.inf)), "coords must be finite"),
    ):
        with pytest.raises(ValueError, match=text):
            model(*given)
    plain = context_parallel(token_set("tssa", positions="none"), group)
    for given, text in (
        ((features[:, : 9 - ours],), "number of features of whole sets must be the same on every rank"),
        ((SetSlice(features) if ours else features,), "number of features of whole sets"),
        ((features, None, mask[:, :5] if ours else mask), r"rank 1: ValueError: token_mask must have shape"),
        ((features, None, mask.float() if ours else mask), "rank 1: TypeError: token_mask must have dtype"),
    ):
        with pytest.raises(ValueError, match=text):
            plain(*given)
    with pytest.raises(ValueError, match="cu_seqlens must be None in context parallel"):
        model(features, coords, cu_seqlens=torch.tensor([0, 4, 9]))
    model.train(not ours)
    with pytest.raises(ValueError, match=r"mode \(training\) must be the same on every rank"):
        model(features, coords)
    assert model.train()(features, coords).shape == (1, 3)  # and all goes on


# ---- training


def trained(model, batches, labels, optimizer):
    losses = []
    for i in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(*batches[i]), labels[i])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def check_training(group):
    """Five steps with data and context parallel, in DDP and FSDP2, are those of one process."""
    size = group.size()
    mesh = ParallelismConfig(dp_shard_size=size // 2, cp_size=2).build_device_mesh(
        "cpu"
    )  # as Accelerate has it
    replicas, replica = size // 2, group.rank() // 2
    assert mesh["cp"].get_local_rank() == group.rank() % 2
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        torch.set_default_dtype(dtype)
        for wrap in (DistributedDataParallel, sharded):
            torch.manual_seed(1)
            model = whitebox()
            alone = copy.deepcopy(model)
            images, labels = torch.randn(5, 4, 3, 64, 48), torch.randint(3, (5, 4))
            batches = [(batch,) for batch in images]
            expected = trained(alone, batches, labels, torch.optim.SGD(alone.parameters(), 0.1))
            if replicas > 1:  # batch norm then sees the images of all replicas
                synchronize_batch_norm(model, torch.device("cpu"))
            wrapped = wrap(parallelize_module(model, mesh["cp"], ContextParallelStyle()))
            own = slice(4 * replica // replicas, 4 * (replica + 1) // replicas)
            optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
            losses = trained(wrapped, [(batch[own],) for batch in images], labels[:, own], optimizer)
            assert_close(summed(losses) / size, expected, tolerance)


def check_training_sets(group):
    """Five steps on one slide, spread over the ranks, are those of one process; in DDP and FSDP2."""
    size = group.size()
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "cp"))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        torch.set_default_dtype(dtype)
        for wrap in (DistributedDataParallel, sharded):
            torch.manual_seed(1)
            model = token_set(drop_rate=0.0)
            alone = copy.deepcopy(model)
            batches = [(torch.randn(1, 40 + i, 7), torch.randint(99, (1, 40 + i, 2))) for i in range(5)]
            labels = torch.randint(3, (5, 1))
            expected = trained(alone, batches, labels, torch.optim.SGD(alone.parameters(), 0.1))
            wrapped = wrap(parallelize_module(model, mesh["cp"], ContextParallelStyle()))
            losses = trained(wrapped, batches, labels, torch.optim.SGD(wrapped.parameters(), 0.1))
            assert_close(summed(losses) / size, expected, tolerance)


def sharded(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_dropout(group):
    """What is dropped of the feature is the same on every rank, whatever their seeds."""
    model = context_parallel(whitebox(drop_rate=0.5, pos_drop_rate=0.1), group)
    torch.manual_seed(group.rank())
    logits = model(torch.ones(8, 3, 64, 48))
    assert all(torch.equal(logits, other) for other in counts(logits.detach(), group.size()))
    assert not torch.equal(logits[0], logits[1])


def check_drop_path(group):
    """Updates that are left out are, on every rank, those that one process with the seed of the first leaves out."""
    torch.set_default_dtype(torch.float64)
    models = [whitebox(drop_path_rate=0.6), whitebox(drop_path_rate=0.6, mlp_ratio=2.0)]
    models[1].set_grad_checkpointing()
    images, cotangent = torch.randn(8, 3, 64, 48), torch.randn(8, 3)
    for model in models:
        torch.manual_seed(5)
        expected = differentiated(model, images, cotangent)
        context_parallel(model, group)
        torch.manual_seed(5 + group.rank())
        actual = differentiated(model, images, cotangent)
        close(actual[0], expected[0], 1e-10)
        for parameter, gradient in expected[2].items():
            with note(parameter):
                close(summed(actual[2][parameter]) / group.size(), gradient, 1e-10)
        for block in model.blocks:
            block.drop_path.rate = 0.0
        assert (model(images) - actual[0]).abs().amax() > 1e-3  # some were left out
