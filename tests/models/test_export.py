"""Models as programs: right at every size where sizes are open, refused at others where they are not."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.export import Dim

from cbsa_torch import CBSABlock
from cbsa_torch.models import TokenSetTransformer, export, export_model, with_fixed_grid
from cbsa_torch.models.export import ExportError, ExportReport, Parity, checked_sizes, size_steps
from cbsa_torch.nn import CBSA, MHSA, MSSA, TSSA, LinearAttention, LinearCBSA
from cbsa_torch.ops import pool_representatives
from tests.helpers.compare import assert_close
from tests.helpers.exports import GRID, MODELS, SIZES, adapted, family, layer, open_program, segmenter, stirred

FAST = {
    **dict.fromkeys(("cbt", "cbt certified", "linear_cbt", "tost", "adapted", "segmenter", "layer"), "onnx"),
    **dict.fromkeys(("crate", "crate_cbt", "agent", "stem_vit", "crate_original"), "torch"),
}
x = torch.randn(2, 3, 32, 32)


def assert_exported(name, kind, folder):
    """It is the model at the eight sizes of the report, and at one that nobody looked at."""
    model = stirred(MODELS[name]())
    file = folder / f"model.{'onnx' if kind == 'onnx' else 'pt2'}"
    report = export_model(model, file, kind, in_chans=3, image_size=32, any_size=True)
    assert len(report.parity) == 16
    assert len({(p.height, p.width) for p in report.parity}) == 8
    assert report.worst.error <= 1e-5
    assert report.num_bytes == file.stat().st_size
    images = torch.randn(2, 3, 24, 88)
    with torch.no_grad():
        assert_close(open_program(file)(images), model(images), 1e-5)
    return model, file, report


@pytest.mark.parametrize("name", FAST)
def test_any_size(name, tmp_path):
    assert_exported(name, FAST[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_any_size_of_every_model(name, tmp_path):
    assert_exported(name, "torch", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_any_size_of_every_model_in_two_runtimes(name, tmp_path):
    openvino = pytest.importorskip("openvino", reason="of the extra dev")
    model, file, report = assert_exported(name, "onnx", tmp_path)
    # in bfloat16 by default, where the processor has it
    program = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for parity in report.parity[::2]:
        images = torch.randn(2, 3, parity.height, parity.width)
        with torch.no_grad():
            assert_close(torch.from_numpy(program([images.numpy()])[0]), model(images), 1e-4)


def test_a_square_matrix_that_is_used_transposed_too(tmp_path):
    """OpenVINO takes one for the other where both are one constant of the graph."""
    openvino = pytest.importorskip("openvino", reason="of the extra dev")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 192, 8, 8), CBSA(192, 3, step="certified", **GRID)).eval()
    export_model(model, tmp_path / "model.onnx", in_chans=3, image_size=32, any_size=True)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    program = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", settings)
    with torch.no_grad():
        assert_close(torch.from_numpy(program([x.numpy()])[0]), model(x), 1e-5)


def test_sides_are_multiples_of_the_patch_where_they_must_be(tmp_path):
    """timm's patch embedding would leave the last rows out."""
    model = adapted(num_representatives=(3, 2))
    assert size_steps(model) == size_steps(family("crate_original")) == (8, 8)
    assert size_steps(family("cbt")) == size_steps(segmenter()) == (1, 1)
    assert all(h % 8 == w % 8 == 0 for h, w in checked_sizes((32, 32), (8, 8)))
    assert any(h % 8 and w % 8 for h, w in checked_sizes((32, 32), (1, 1)))
    with pytest.raises(ExportError, match="image_size must have a width that is a multiple of 8, got 36"):
        export_model(model, tmp_path / "model.onnx", in_chans=3, image_size=(32, 36))
    export_model(model, tmp_path / "model.onnx", in_chans=3, image_size=32, any_size=True)
    with pytest.raises(Exception, match="Split"):
        open_program(tmp_path / "model.onnx")(torch.randn(1, 3, 36, 44))


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_program_of_one_size_refuses_others(kind, tmp_path):
    file = tmp_path / ("model.onnx" if kind == "onnx" else "model.pt2")
    model = family("cbt", num_representatives=4)
    report = export_model(model, file, kind, in_chans=3, image_size=(16, 40))
    assert [(p.batch, p.height, p.width) for p in report.parity] == [(1, 16, 40), (3, 16, 40)]
    program = open_program(file)
    images = torch.randn(5, 3, 16, 40)
    with torch.no_grad():
        assert_close(program(images), model(images), 1e-5)
    with pytest.raises(Exception, match=r"Got: 48 Expected: 40" if kind == "onnx" else r"size\(\)\[3\] == 40"):
        program(torch.randn(1, 3, 16, 48))


def test_what_has_no_program_is_refused_before_anything_is_written(tmp_path):
    def refused(message, model, error=ExportError, **options):
        with pytest.raises(error, match=message):
            export_model(model, tmp_path / "model", **{"in_chans": 3, "image_size": 32, **options})

    grid = r"num_representatives must be a grid such as \(8, 8\) for any_size, got 4 \(of blocks.0.attn.repr"
    refused(grid, family("cbt", num_representatives=4), any_size=True)
    fixed = timm.create_model("vit_tiny_patch16_224", **SIZES)
    refused("was built for one: build it with dynamic_img_size=True", fixed, any_size=True)
    refused("must be one of images", TokenSetTransformer(8, dim=16, depth=1, num_heads=2))
    refused("format must be one of 'onnx', 'torch', got 'tflite'", layer(), ValueError, format="tflite")
    # its branch depends on the values
    refused("no program of format 'torch'", _Branching(), format="torch")
    assert list(tmp_path.iterdir()) == []


class _Branching(torch.nn.Module):
    def forward(self, images):
        return images * (2 if images.sum() > 0 else 3)


def test_a_program_that_differs_is_not_written(tmp_path):
    """Its factor is drawn: that of the program is another."""

    class Drawing(torch.nn.Module):
        def forward(self, images):
            return images * torch.rand(())

    with pytest.raises(
        ExportError, match="differs from the model by .* more than 1e-05, for . images of 32 x 32"
    ):
        export_model(Drawing(), tmp_path / "model.pt2", "torch", in_chans=3, image_size=32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_rotary_embedding_of_dinov3_fixes_the_grid_of_torch_programs(tmp_path):
    """timm makes numbers of height and width, of which PyTorch's programs keep a guard."""
    model = adapted("vit_small_patch16_dinov3", embed_dim=32, num_representatives=(3, 2))
    with pytest.raises(ExportError, match="does not run on .* Guard failed"):
        export_model(model, tmp_path / "model.pt2", "torch", in_chans=3, image_size=32, any_size=True)
    assert list(tmp_path.iterdir()) == []
    export_model(model, tmp_path / "one.pt2", "torch", in_chans=3, image_size=32)
    report = export_model(model, tmp_path / "model.onnx", in_chans=3, image_size=32, any_size=True)
    assert report.worst.error <= 1e-5


def test_outputs_near_zero_are_held_to_the_largest_of_all(tmp_path, monkeypatch):
    """Of a single logit that is 0, rounding would be infinitely much."""

    class Single(torch.nn.Module):
        def forward(self, images):
            return images.mean((1, 2, 3)) * (images.shape[0] - 1)

    rounded = (b"", 1, lambda images: Single()(images) + 1e-7)
    monkeypatch.setitem(export._WRITERS, "torch", lambda *_: rounded)
    report = export_model(Single(), tmp_path / "model.pt2", "torch", in_chans=3, image_size=8)
    assert 0 < report.worst.error <= 1e-5


def test_offloaded_weights_are_refused(tmp_path):
    import accelerate

    model = accelerate.cpu_offload(family("tost"), torch.device("cpu"))
    with pytest.raises(ExportError, match="some are on meta: load those that are offloaded first"):
        export_model(model, tmp_path / "model.pt2", "torch", in_chans=3, image_size=32)


def test_nan_is_the_largest_difference():
    errors = (1e-7, float("nan"), 1e-3)
    parity = [Parity(1, 8, 8 + i, error) for i, error in enumerate(errors)]
    assert ExportReport("onnx", True, (8, 8), (1, 1), 1, 1, 1e-5, parity).worst is parity[1]


@torch.no_grad()
def test_a_fixed_grid():
    model = family("cbt", num_representatives=4)
    fixed = with_fixed_grid(model, (2, 2))
    assert_close(fixed(x), model(x), 1e-6)
    wide = torch.randn(1, 3, 16, 64)
    assert (fixed(wide) - model(wide)).abs().max() > 1e-6
    with pytest.raises(ValueError, match="num_representatives is of pooled representatives; .* has none"):
        with_fixed_grid(family("crate"), (2, 2))


# ---- torch.export itself, without export_model


class Pooled(torch.nn.Module):
    def forward(self, images):
        height, width = images.shape[2:]
        tokens = images.flatten(2).transpose(1, 2)[:, None]
        return pool_representatives(tokens, (height, width), 4).values


NUMBERS = {
    "cbt": lambda: family("cbt", num_representatives=4),
    "certified": lambda: family("cbt", num_representatives=4, step="certified"),
    "adapted": lambda: adapted(num_representatives=4),
    "segmenter": lambda: segmenter(mixer_args={"num_representatives": 4}),
    "pooling": Pooled,
}
LATTICES = {**NUMBERS, "layer": lambda: layer(num_representatives=(2, 3))}


@pytest.mark.parametrize("build", NUMBERS)
@torch.no_grad()
def test_a_number_of_representatives_needs_a_grid_where_sizes_are_open(build):
    dynamic = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with pytest.raises(ValueError, match=r"num_representatives must be a grid such as \(2, 2\) .* got 4"):
        torch.export.export(NUMBERS[build](), (torch.randn(2, 3, 32, 48),), dynamic_shapes=(dynamic,))


@torch.no_grad()
def test_tokens_need_a_grid_where_their_number_is_open():
    class WithGrid(torch.nn.Module):
        def __init__(self, mixer):
            super().__init__()
            self.mixer = mixer

        def forward(self, maps):
            return self.mixer(maps.flatten(2).mT, grid_size=maps.shape[2:])

    mixer, tokens = CBSA(16, 2, num_representatives=(2, 3)).eval(), torch.randn(2, 36, 16)
    dynamic = ({1: Dim.DYNAMIC},)
    with pytest.raises(
        ValueError, match=r"grid_size is needed where an export leaves the number of tokens open"
    ):
        torch.export.export(mixer, (tokens,), dynamic_shapes=dynamic)
    mixer.set_input_size((4, 9))
    with pytest.raises(ValueError, match=r"grid_size \(4, 9\) is that of the example"):
        torch.export.export(mixer, (tokens,), dynamic_shapes=dynamic)
    model, maps = WithGrid(mixer), torch.randn(2, 16, 4, 9)
    program = torch.export.export(model, (maps,), dynamic_shapes=({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)).module()
    for size in ((7, 5), (2, 6)):
        maps = torch.randn(2, 16, *size)
        assert_close(program(maps), model(maps), 1e-5)


@pytest.mark.parametrize("build", LATTICES)
@torch.no_grad()
def test_a_dynamic_batch_is_exported(build):
    model = LATTICES[build]()
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC},)).module()
    more = torch.randn(5, 3, 32, 32)
    assert_close(exported(more), model(more), 1e-5)


@pytest.mark.parametrize("mixer", [LinearCBSA, LinearAttention, MSSA, MHSA, TSSA])
@torch.no_grad()
def test_layers_without_a_grid_take_a_dynamic_number_of_tokens(mixer):
    model, tokens = mixer(16, 2).eval(), torch.randn(2, 17, 16)
    exported = torch.export.export(model, (tokens,), dynamic_shapes=({1: Dim.DYNAMIC},)).module()
    more = torch.randn(2, 30, 16)
    assert_close(exported(more), model(more), 1e-5)


@pytest.mark.parametrize("cells", [(3,), (2, 2), (2, 3, 2)])
@torch.no_grad()
def test_sequences_and_volumes_leave_their_sizes_open(cells):
    block = stirred(CBSABlock(16, 2, num_representatives=cells).eval())
    axes = range(2, 2 + len(cells))
    example = torch.randn(2, 16, *(5, 6, 7)[: len(cells)])
    dynamic = dict.fromkeys((0, *axes), Dim.DYNAMIC)
    program = torch.export.export(block, (example,), dynamic_shapes=(dynamic,))
    for grid in ((4, 9, 3), (9, 2, 8), (2, 3, 2)):
        x = torch.randn(3, 16, *grid[: len(cells)])
        assert_close(program.module()(x), block(x), 1e-5)


def test_an_export_leaves_the_model_as_it_was():
    """The grids that its layers look up are those of its images again."""
    model = adapted(num_representatives=(2, 3))
    wide = torch.randn(1, 3, 16, 64)
    with torch.no_grad():
        expected = model(wide)
        dynamic = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
        torch.export.export(model, (torch.randn(1, 3, 24, 40),), dynamic_shapes=(dynamic,))
        assert_close(model(wide), expected, 0)


def test_factorisations_are_refused_in_an_export_to_onnx(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    tokens = torch.randn(1, 9, 16)
    with pytest.raises(ValueError, match="ONNX has no QR decomposition: export the model fused"):
        CBSA(16, 2, orthogonal=True)(tokens)
    for mixer in (
        LinearCBSA(16, 2, solver="eigh"),
        CBSA(16, 2, representatives="principal", contraction="exact"),
    ):
        with pytest.raises(ValueError, match="ONNX has no eigendecomposition: use solver='cholesky'"):
            mixer(tokens)


# ---- torch.jit.trace


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("size", [(16, 64), (64, 64), (32, 40), (48, 32)])
@pytest.mark.parametrize("build", [name for name in LATTICES if name != "pooling"])
@torch.no_grad()
def test_a_traced_model_refuses_other_sizes(build, size):
    """Also those with as many patches: 2 x 8 are no 4 x 4."""
    model = LATTICES[build]()
    traced = torch.jit.trace(model, (x,))
    assert_close(traced(x), model(x), 1e-5)
    with pytest.raises(RuntimeError):
        traced(torch.randn(2, 3, *size))
