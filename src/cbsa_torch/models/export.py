"""Models and layers as programs that run without this library: ``torch.export`` and ONNX, held to the model."""

from __future__ import annotations

import copy
import functools
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cbsa_torch._core.checks import check_bool, check_choice, check_positive_int, check_sides
from cbsa_torch._core.files import write_atomically
from cbsa_torch._core.optional import require
from cbsa_torch._core.tracing import is_open
from cbsa_torch.models.resize import resize
from cbsa_torch.models.token_set import TokenSetTransformer
from cbsa_torch.nn import LinearStem, PooledRepresentatives
from cbsa_torch.ops.pooling import check_num_representatives

ExportFormat = Literal["onnx", "torch"]
FORMATS: tuple[str, ...] = get_args(ExportFormat)
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
"""Names of files by format."""
TOLERANCE = 1e-5
"""The largest difference from the model that an export may have, relative to the largest output."""
BATCHES = (1, 3)
INPUT, OUTPUT = "images", "output"
"""Names in ONNX graphs."""
_SHAPES = ((1, 1), (1, 1.5), (1.5, 1), (0.5, 1), (1, 0.5), (0.75, 2), (2, 0.75), (1.25, 1.25))
"""Heights and widths that programs of any size are checked at, over those of the images the model is for."""


class ExportError(ValueError):
    """A model that has no such program, or one that is not the model; nothing is written then.

    Examples:
        >>> import timm
        >>> from cbsa_torch.models import ExportError, export_model
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1)  # 16 representatives at any aspect
        >>> try:
        ...     export_model(model, "model.pt2", "torch", in_chans=1, image_size=8, any_size=True)
        ... except ExportError as error:
        ...     print("with_fixed_grid" in str(error))
        True
    """


@dataclass(frozen=True)
class Parity:
    """A program beside its model, on one batch of noise."""

    batch: int
    height: int
    width: int
    error: float
    """The largest difference between the outputs over the largest output of the model, at any size."""


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_model` wrote.

    Examples:
        >>> import timm
        >>> from cbsa_torch.models import export_model
        >>> model = timm.create_model("stem_vit_pico_patch1_8", depth=1)
        >>> report = export_model(model, "vit.pt2", "torch", in_chans=1, image_size=8)
        >>> report.image_size, [(parity.batch, parity.height) for parity in report.parity]
        ((8, 8), [(1, 8), (3, 8)])
    """

    format: str
    """``"onnx"`` or ``"torch"``."""
    any_size: bool
    """Whether height and width are open; the batch always is."""
    image_size: tuple[int, int]
    """Height and width of the images; with ``any_size`` those that the sizes below are multiples of."""
    multiple_of: tuple[int, int]
    """What heights and widths must be multiples of, in pixels."""
    num_bytes: int
    """Of the file."""
    num_nodes: int
    """Operations in the graph, those in the bodies of loops included."""
    tolerance: float
    """What ``worst`` may differ by."""
    parity: list[Parity]
    """The program beside the model, at every size."""

    @property
    def worst(self) -> Parity:
        """Where the program differs most from the model, which is where it is NaN, if it is."""
        return max(self.parity, key=lambda parity: (math.isnan(parity.error), parity.error))

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def export_model(
    model: nn.Module,
    path: str | Path,
    format: ExportFormat = "onnx",
    *,
    in_chans: int,
    image_size: int | Sequence[int],
    any_size: bool = False,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Write a model of images, or a layer of feature maps, as a program, and compare the two.

    What is exported is a copy in evaluation mode, in float32 and fused (``timm.utils.reparameterize_model``).
    The program is run on batches of 1 and 3 images of noise, with ``any_size`` of eight sizes, portrait and
    landscape: by ONNX Runtime if it is ONNX.

    Args:
        model: called with ``(B, in_chans, height, width)``, returns a tensor: our models, adapted ViTs with
            ``dynamic_img_size``, segmenters, mixers (whose ``dim`` is ``in_chans``).
        path: the file.
        format: ``"onnx"``, or ``"torch"``: a program of ``torch.export``, for ``torch.export.load``.
        in_chans: channels of the images.
        image_size: side or ``(height, width)`` in pixels.
        any_size: leave height and width open. Pooled representatives then need a grid, such as
            ``num_representatives=(8, 8)``; see :func:`with_fixed_grid`.
        tolerance: how much the program may differ from the model, relative to the largest output.

    Returns:
        What was written, and how far it is from the model at every size.

    Raises:
        ExportError: no such program exists of the model, or it differs from the model. ImportError: ``"onnx"``
            without the extra ``export``. Nothing is written then.

    Examples:
        >>> import timm
        >>> from cbsa_torch.models import export_model
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1)
        >>> report = export_model(model, "model.pt2", "torch", in_chans=1, image_size=8)
        >>> report.any_size, report.worst.error <= report.tolerance
        (False, True)
    """
    check_choice("format", format, FORMATS)
    check_positive_int("in_chans", in_chans)
    check_bool("any_size", any_size)
    sides = check_sides("image_size", tuple(image_size) if isinstance(image_size, Sequence) else image_size)
    if format == "onnx":
        require("export")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ExportError(
            "model must hold its weights, and some are on meta: load those that are offloaded first"
        )
    plain = copy.deepcopy(model).cpu().float().eval()
    _refuse(plain, any_size=any_size)
    steps = size_steps(plain)
    for name, side, step in zip(("height", "width"), sides, steps, strict=True):
        if side % step:
            raise ExportError(f"image_size must have a {name} that is a multiple of {step}, got {side}")
    fused = _WholePatches(reparameterize_model(plain), steps if any_size else (1, 1)).eval()
    sizes = checked_sizes(sides, steps) if any_size else [sides]
    noise = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    example = noise(2, in_chans, *(_example_size(sides, steps) if any_size else sides))
    with torch.no_grad(), _quiet():
        try:
            content, num_nodes, run = _WRITERS[format](fused, example, any_size)
        except Exception as error:
            kind, cause = type(model).__name__, _cause(error)
            raise ExportError(f"{kind} has no program of format {format!r}: {cause}") from error
        parity = _compare(plain, run, [noise(batch, in_chans, *size) for size in sizes for batch in BATCHES])
    report = ExportReport(format, any_size, sides, steps, len(content), num_nodes, tolerance, parity)
    if not report.worst.error <= tolerance:
        worst = report.worst
        raise ExportError(
            f"the program differs from the model by {worst.error:.3g} of the largest output, more than "
            f"{tolerance:g}, for {worst.batch} images of {worst.height} x {worst.width}; nothing was written. "
            "A little more may be rounding in float32, which a larger tolerance admits"
        )
    write_atomically(Path(path), content)
    return report


def with_fixed_grid(model: nn.Module, cells: Sequence[int]) -> nn.Module:
    """A copy whose pooled representatives are a grid of ``cells`` at any aspect, never more than tokens.

    On images whose grid ``num_representatives`` patches had the same number of cells it computes the same as
    before: 64 representatives of 14 x 14 patches are 8 x 8.

    Raises:
        ValueError: cells that are no grid, or a model without pooled representatives.

    Examples:
        >>> import timm
        >>> from cbsa_torch.models import with_fixed_grid
        >>> model = with_fixed_grid(timm.create_model("cbt_pico_patch1_8"), (4, 4))
        >>> model.blocks[0].attn.representatives
        PooledRepresentatives(num_representatives=(4, 4))
    """
    number = check_num_representatives(tuple(cells))
    model = copy.deepcopy(model)
    pooled = [module for module in model.modules() if isinstance(module, PooledRepresentatives)]
    if not pooled:
        raise ValueError(f"num_representatives is of pooled representatives; {type(model).__name__} has none")
    for module in pooled:
        module.num_representatives = number
    return model


def size_steps(model: nn.Module) -> tuple[int, int]:
    """What sides of images must be multiples of: the patch, where a model takes whole patches only."""
    stem: Any = getattr(model, "stem", None)
    if isinstance(stem, LinearStem):
        return stem.patch_size, stem.patch_size
    embedding: Any = getattr(model, "patch_embed", None)
    if hasattr(embedding, "patch_size") and not getattr(embedding, "dynamic_img_pad", False):
        vertical, horizontal = embedding.patch_size
        return int(vertical), int(horizontal)
    return 1, 1


def checked_sizes(image_size: tuple[int, int], steps: tuple[int, int]) -> list[tuple[int, int]]:
    """Eight heights and widths, portrait and landscape, that a program of any size is compared at."""
    return [
        (_scaled(image_size[0], vertical, steps[0], i), _scaled(image_size[1], horizontal, steps[1], 2 * i))
        for i, (vertical, horizontal) in enumerate(_SHAPES)
    ]


def _scaled(side: int, factor: float, step: int, odd: int) -> int:
    """About ``factor`` times a side, a multiple of the step; of any number of pixels where that is 1."""
    wanted = side * factor + (odd if step == 1 and odd else 0)
    return max(round(wanted / step), 2) * step


def _example_size(image_size: tuple[int, int], steps: tuple[int, int]) -> tuple[int, int]:
    """The size that a program of any size is made with: of no side that the model might know."""
    height, width = (
        _scaled(side, factor, step, 3)
        for side, factor, step in zip(image_size, (1.5, 1.25), steps, strict=True)
    )
    return height, width + steps[1] * (height == width)


def _refuse(model: nn.Module, *, any_size: bool) -> None:
    """Raise ``ExportError`` for what is known to have no program, before anything is traced."""
    if isinstance(model, TokenSetTransformer):
        raise ExportError(
            "model must be one of images: how many cells a set of features is pooled to depends on the values "
            "of its coordinates, and a graph has no such sizes"
        )
    if not any_size:
        return
    for name, module in model.named_modules():
        number = getattr(module, "num_representatives", None)
        if isinstance(module, PooledRepresentatives) and isinstance(number, int):
            raise ExportError(
                f"num_representatives must be a grid such as (8, 8) for any_size, got {number} (of {name}): "
                "of a number, the grid of representatives follows the aspect of each image. Build the model "
                "with a grid, or fix it by cbsa_torch.models.with_fixed_grid(model, (8, 8)) "
                "(cbsa export --num-representatives 8 8)"
            )
    if getattr(getattr(model, "patch_embed", None), "strict_img_size", False):
        raise ExportError(
            f"any_size needs a model that takes images of any size, and {type(model).__name__} was built for "
            "one: build it with dynamic_img_size=True"
        )


class _WholePatches(nn.Module):
    """A model whose program raises at sizes that are no multiples, where it would just leave pixels out."""

    def __init__(self, model: nn.Module, steps: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.steps = steps

    def forward(self, images: Tensor) -> Tensor:
        for axis, step in zip((2, 3), self.steps, strict=True):
            if step > 1:
                (images,) = images.split_with_sizes([images.shape[axis] // step * step], axis)
        output = self.model(images)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"model must return a tensor, got {type(output).__name__}; wrap it in a module that returns "
                "one, such as its logits"
            )
        return output


class _OpenResizing(TorchFunctionMode):
    """Antialiased resizing to an open size as products, also in timm's models: see :func:`resize`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate and kwargs.get("antialias") and kwargs.get("size") is not None:
            size, mode = kwargs["size"], kwargs.get("mode", "nearest")
            if is_open(*size) and not kwargs.get("align_corners"):
                return resize(args[0] if args else kwargs["input"], tuple(size), mode)
        return func(*args, **kwargs)


_Run = Callable[[Tensor], Tensor]


def _write_torch(model: nn.Module, example: Tensor, any_size: bool) -> tuple[bytes, int, _Run]:
    dynamic = dict.fromkeys((0, 2, 3) if any_size else (0,), torch.export.Dim.DYNAMIC)
    with _OpenResizing():
        program = torch.export.export(model, (example,), dynamic_shapes=({**dynamic},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    module = torch.export.load(buffer).module()
    return buffer.getvalue(), sum(node.op == "call_function" for node in program.graph.nodes), module


def _write_onnx(model: nn.Module, example: Tensor, any_size: bool) -> tuple[bytes, int, _Run]:
    import onnxruntime
    from onnxscript.optimizer import fold_constants

    names = {0: "batch", 2: "height", 3: "width"} if any_size else {0: "batch"}
    with _OpenResizing():
        program = torch.onnx.export(
            model,
            (example,),
            dynamic_shapes=(names,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "of dynamo=True"
    # OpenVINO 2026.4 takes a square matrix that is used both as it is and transposed for one of the two, in
    # silence. PyTorch leaves transposed weights of more than 8 KiB to the program: here they become constants.
    fold_constants(program.model, should_fold=lambda node: True if node.op_type == "Transpose" else None)
    with tempfile.TemporaryDirectory() as folder:  # the runtime reads what was written
        file = Path(folder) / FILES["onnx"]
        program.save(file, external_data=False)
        content = file.read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return content, count_nodes(program.model.graph), run


_WRITERS = {"torch": _write_torch, "onnx": _write_onnx}


def count_nodes(graph: Any) -> int:
    """Nodes of an ONNX graph, those of graphs in attributes (bodies of loops) included."""
    bodies = (attribute.value for node in graph for attribute in node.attributes.values())
    return len(graph) + sum(count_nodes(body) for body in bodies if hasattr(body, "all_nodes"))


def _compare(model: nn.Module, run: _Run, batches: Iterable[Tensor]) -> list[Parity]:
    """The program beside the model on every batch.

    A single output may be near 0, and its rounding large beside it: errors are relative to the largest of all.
    """
    differences, largest = [], torch.finfo(torch.float32).tiny
    for images in batches:
        batch, _, height, width = images.shape
        expected = model(images)
        try:
            output = run(images)
        except Exception as error:  # of a runtime
            raise ExportError(
                f"the program does not run on {batch} images of {height} x {width}: {error}; "
                "nothing was written"
            ) from error
        if output.shape != expected.shape:
            raise ExportError(
                f"the program gives {tuple(output.shape)} for {batch} images of {height} x {width}, the model "
                f"{tuple(expected.shape)}; nothing was written"
            )
        largest = max(largest, expected.abs().max().item())
        differences.append((batch, height, width, (output - expected).abs().max().item()))
    return [Parity(b, h, w, difference / largest) for b, h, w, difference in differences]


def _cause(error: BaseException) -> BaseException:
    """What an exporter met: its own errors are around that."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings, which the comparison with the model answers."""
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
