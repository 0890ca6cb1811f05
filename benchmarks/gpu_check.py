"""What a CUDA device says: is every kernel right, how fast are operator, layers and models.

    PYTHONPATH=src python benchmarks/gpu_check.py [--output FILE] [--minutes 8] [--only core layers ...]
    TRITON_INTERPRET=1 PYTHONPATH=src python benchmarks/gpu_check.py --quick

It needs torch, triton and timm, and nothing installed. Each result is printed and written to the JSON file at
once, so that a run cut short still tells. ``--quick`` goes the same way on tiny sizes; without a CUDA device it
needs Triton's interpreter, which cannot compute in bfloat16 and is not asked to: the record says so.

The parts, in their order:

- limits: bytes per second of a copy, operations per second of a bfloat16 product, on this device;
- correct: Triton and tiles against the equations in float64, outputs and gradients, and twice the same bits;
- core: the operator alone, over the traffic it cannot avoid (3 N p elements per head forward, 5 N p backward);
- layers: 384 channels, 6 heads, bfloat16, over the time of the products that every implementation computes;
- models: images per second at 224, 512 and 1,024 pixels a side, under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch._core.types import CONTRACTIONS

CASES = [  # B, H, N, M, P, masked, separate keys and values
    (4, 6, 197, 64, 64, False, False),
    (1, 2, 4097, 64, 64, False, False),
    (2, 3, 333, 64, 64, True, False),
    (2, 2, 77, 100, 64, False, True),
    (1, 2, 1000, 49, 32, True, True),
    (1, 1, 2048, 256, 128, False, False),
    (1, 2, 513, 16, 20, True, True),
    (1, 1, 5, 64, 64, False, False),
    (1, 1, 1, 1, 16, False, False),
]
QUICK_CASES = [(1, 2, 70, 9, 16, False, False), (1, 1, 33, 5, 16, True, True)]
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative to the largest entry, or twice the error of the eager form, if that is more."""
NAMES = ("cbt", "vit", "crate", "tost", "agent")


class TimeUpError(Exception):
    """The minutes are over."""


class Check:
    """What was found so far, and the device it was found on."""

    def __init__(self, path: Path, minutes: float, quick: bool) -> None:
        self.path, self.quick, self.begin = path, quick, time.monotonic()
        self.end = self.begin + 60 * minutes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rows: list[dict[str, Any]] = []
        self.bytes_per_second, self.operations_per_second = 1e10, 1e11

    def add(self, kind: str, **values: Any) -> None:
        """Print and keep a result."""
        row = {"kind": kind, "second": round(time.monotonic() - self.begin, 1), **values}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")

    def go_on(self) -> None:
        """Raise if the time is up."""
        if time.monotonic() > self.end:
            raise TimeUpError

    def milliseconds(self, function: Callable[[], Any], budget: float = 0.3, most: int = 50) -> float:
        """Median of single calls, by events of the device; the first two warm up."""
        for _ in range(2):
            function()
        times: list[float] = []
        begin = time.monotonic()
        while len(times) < 3 or (time.monotonic() - begin < budget and len(times) < most):
            if self.device == "cuda":
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                function()
                last.record()
                torch.cuda.synchronize()
                times.append(first.elapsed_time(last))
            else:
                start = time.perf_counter()
                function()
                times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def peak_mib(self, function: Callable[[], Any]) -> float | None:
        """Memory at the worst moment beyond what was there before; None on the CPU."""
        if self.device != "cuda":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def times(self, forward: Callable[[], Any], step: Callable[[], Any]) -> dict[str, Any]:
        """Both times, and the memory of the step."""
        found: dict[str, Any] = {
            "forward_ms": self.milliseconds(forward),
            "step_ms": self.milliseconds(step),
        }
        return {**found, "step_mib": self.peak_mib(step)}


def limits(check: Check) -> None:
    """The two limits of this device."""
    size, side = (2**23, 256) if check.quick else (2**29, 8192)
    a = torch.randn(size, device=check.device).to(torch.bfloat16)
    b = torch.empty_like(a)
    check.bytes_per_second = 2e3 * 2 * size / check.milliseconds(lambda: b.copy_(a))
    x, y = (torch.randn(side, side, device=check.device, dtype=torch.bfloat16) for _ in range(2))
    check.operations_per_second = 2e3 * side**3 / check.milliseconds(lambda: x @ y)
    check.add(
        "limits",
        terabytes_per_second=check.bytes_per_second / 1e12,
        bf16_teraflops=check.operations_per_second / 1e12,
    )


def correct(check: Check) -> None:
    """Outputs and all gradients against float64."""
    dtypes = list(TOLERANCES)
    if check.device == "cpu":
        dtypes.remove(torch.bfloat16)
        check.add("skipped", what="bfloat16: Triton's interpreter cannot compute in it")
    for case in QUICK_CASES if check.quick else CASES:
        for contraction in CONTRACTIONS:
            for dtype in dtypes:
                check.go_on()
                _correct(check, case, contraction, dtype)


def _correct(check: Check, case: tuple[Any, ...], contraction: Any, dtype: torch.dtype) -> None:
    b, h, n, m, p, masked, separate = case
    rows = (n, m, n, n) if separate else (n, m)
    base = [torch.randn(b, h, size, p, device=check.device).to(dtype) for size in rows]
    base += [torch.randn(h, device=check.device) for _ in range(2)]
    mask = None
    if masked:
        mask = torch.rand(b, n, device=check.device) > 0.3
        mask[:, 0] = True
    weight = torch.randn(b, h, n, p, device=check.device)
    truth = _outputs(base, contraction, mask, weight, "eager", torch.float64)
    scales = [t.abs().max().clamp(min=1e-6) for t in truth]
    for i in (-2, -1):  # the gradients of the two steps are sums that may cancel
        scales[i] = scales[i].maximum((truth[0] * weight).norm())

    def errors(found: list[Tensor]) -> list[float]:
        return [float((a - t).abs().max() / s) for a, t, s in zip(found, truth, scales, strict=True)]

    eager = errors(_outputs(base, contraction, mask, weight, "eager", dtype))
    for impl in ("triton", "tiled"):
        row = {"impl": impl, "dtype": str(dtype), "case": case, "contraction": contraction}
        try:
            found, again = (_outputs(base, contraction, mask, weight, impl, dtype) for _ in range(2))
        except Exception as error:  # the other cases may still tell something
            check.add("correct", **row, right=False, error=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        ours = errors(found)
        right = all(e <= max(2 * x, TOLERANCES[dtype]) for e, x in zip(ours, eager, strict=True))
        same = all(map(torch.equal, found, again))
        check.add("correct", **row, right=right and same, same_bits=same, error=max(ours), eager=max(eager))


def _outputs(
    base: list[Tensor],
    contraction: Any,
    mask: Tensor | None,
    weight: Tensor,
    impl: Any,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The output and the gradients of what goes into it, in float64."""
    from cbsa_torch import ops

    *tensors, eta, kappa = (t.double() if dtype == torch.float64 else t.clone() for t in base)
    for t in (*tensors, eta, kappa):
        t.requires_grad_()
    tokens, representatives, *others = tensors
    options: dict[str, Any] = dict(zip(("keys", "values"), others, strict=False))
    options |= {"step_representatives": eta, "step_tokens": kappa, "token_mask": mask}
    output = ops.cbsa(tokens, representatives, contraction=contraction, impl=impl, **options)
    leaves = [t for t in tensors if not (others and t is tokens)] + [eta, kappa]
    gradients = torch.autograd.grad(output, leaves, weight.to(output.dtype))
    return [t.detach().double() for t in (output, *gradients)]


def core(check: Check) -> None:
    """The operator alone."""
    from cbsa_torch import ops

    sizes = [(16, 6, 1024), (256, 6, 197), (8, 6, 4096), (1, 6, 16384), (1, 6, 262144)]
    dtypes = [torch.bfloat16, torch.float32]
    if check.quick:
        sizes, dtypes = [(1, 2, 300)], [torch.float32]
    cases: Any = itertools.product(dtypes, sizes, ("eager", "triton"))
    for dtype, (b, h, n), impl in cases:
        check.go_on()
        tokens, weight = (torch.randn(b, h, n, 64, device=check.device, dtype=dtype) for _ in range(2))
        representatives = torch.randn(b, h, 64, 64, device=check.device, dtype=dtype)
        inputs = (tokens.requires_grad_(), representatives.requires_grad_())
        run: Any = functools.partial(ops.cbsa, *inputs, impl=impl)
        found = check.times(torch.no_grad()(run), functools.partial(_differentiate, run, inputs, weight))
        unit = 1e3 * tokens.numel() * tokens.element_size() / check.bytes_per_second
        found["forward_over_limit"] = found["forward_ms"] / (3 * unit)
        found["step_over_limit"] = found["step_ms"] / (8 * unit)
        check.add("core", impl=impl, dtype=str(dtype), size=[b, h, n], **found)


def _differentiate(run: Callable[[], Tensor], inputs: tuple[Tensor, ...], weight: Tensor) -> None:
    torch.autograd.grad(run(), inputs, weight)


def layers(check: Check) -> None:
    """Layers, eager and compiled."""
    from timm.layers.attention import Attention

    from cbsa_torch import CBSA
    from cbsa_torch.bench.baselines import NaiveCBSA

    dim, heads = (32, 2) if check.quick else (384, 6)
    dtype = torch.float32 if check.quick else torch.bfloat16
    ours = functools.partial(CBSA, dim, heads, num_prefix_tokens=1)
    compiled = functools.partial(torch.compile, mode="reduce-overhead")
    sizes = [(1, 5)] if check.quick else [(128, 14), (32, 32), (8, 64), (2, 128), (1, 256), (1, 512), (1, 1024)]
    for b, side in sizes:
        n = side * side + 1
        x = torch.randn(b, n, dim, device=check.device, dtype=dtype, requires_grad=True)
        weight = torch.randn_like(x)
        limit = 1e3 * b * n * (4 * dim * dim + 4 * 64 * dim) / check.operations_per_second
        built: dict[str, Any] = {
            "naive": NaiveCBSA(dim, heads),
            **{impl: ours(impl=impl) for impl in ("eager", "triton", "auto")},
        }
        if n < 70_000:
            built["softmax attention"] = Attention(dim, heads)
        if not check.quick and side in (14, 64):
            built |= {f"{name}, compiled": compiled(built[name]) for name in tuple(built) if name != "auto"}
        for name, layer in built.items():
            check.go_on()
            layer.to(device=check.device, dtype=dtype)
            try:
                found = check.times(*_calls(layer, x, weight))
            except Exception as error:  # out of memory, say; the others may still tell something
                check.add(
                    "failed",
                    part=f"layer {name} {b} x {n}",
                    error=f"{type(error).__name__}: {str(error)[:300]}",
                )
                continue
            found["forward_over_limit"] = found["forward_ms"] / limit
            found["step_over_limit"] = found["step_ms"] / (3 * limit)
            check.add("layer", name=name, batch=b, tokens=n, **found)
        _forget()


def _calls(layer: nn.Module, x: Tensor, weight: Tensor) -> Iterator[Callable[[], Any]]:
    """Inference, and a step of training."""

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(weight)

    yield torch.no_grad()(lambda: layer(x))
    yield step


def models(check: Check) -> None:
    """Whole models."""
    import timm

    import cbsa_torch.models  # noqa: F401  (registers ours)

    kind = "tiny" if check.quick else "small"
    for size, batch in [(32, 1)] if check.quick else [(224, 256), (512, 64), (1024, 16)]:
        for name in [f"{n}_{kind}_patch16_224" for n in NAMES]:
            for impl in ("eager", "triton", "auto") if name.startswith("cbt") else (None,):
                check.go_on()
                model = timm.create_model(name, img_size=size, **({} if impl is None else {"impl": impl}))
                images = torch.randn(batch, 3, size, size, device=check.device)
                found = check.times(*_model_calls(model.to(check.device), images, check))
                found = {
                    "forward_images_per_second": 1e3 * batch / found["forward_ms"],
                    "training_images_per_second": 1e3 * batch / found["step_ms"],
                    "step_mib": found["step_mib"],
                }
                check.add("model", name=name, impl=impl, image_size=size, batch=batch, **found)
            _forget()


def _model_calls(model: nn.Module, images: Tensor, check: Check) -> Iterator[Callable[[], Any]]:
    """Inference, and a step of training without the optimiser."""
    autocast = functools.partial(torch.autocast, check.device, torch.bfloat16, enabled=not check.quick)
    labels = torch.zeros(len(images), dtype=torch.long, device=check.device)

    def forward() -> None:
        with torch.no_grad(), autocast():
            model.eval()(images)

    def step() -> None:
        model.train().zero_grad(set_to_none=True)
        with autocast():
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()

    yield forward
    yield step


def _forget() -> None:
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PARTS = {"limits": limits, "correct": correct, "core": core, "layers": layers, "models": models}


def main(arguments: list[str] | None = None) -> int:
    """The number of wrong cases, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(arguments)
    missing = [name for name in ("triton", "timm") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} must be installed")
    check = Check(options.output, options.minutes, options.quick)
    if check.device == "cpu" and not (options.quick and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("no CUDA device; with TRITON_INTERPRET=1, --quick runs on the CPU")
    import timm
    import triton

    versions = {m.__name__: m.__version__ for m in (torch, triton, timm)}
    device = torch.cuda.get_device_name() if check.device == "cuda" else "cpu, Triton's interpreter"
    date = time.strftime("%Y-%m-%d")
    check.add("versions", device=device, date=date, python=platform.python_version(), **versions)
    torch.manual_seed(0)
    for name in options.only:
        try:
            PARTS[name](check)
        except TimeUpError:
            check.add("stopped", at=name, why="the time is up")
            break
    cases = [row for row in check.rows if row["kind"] == "correct"]
    wrong = sum(not row["right"] for row in cases)
    failed = sum(row["kind"] == "failed" for row in check.rows)
    print(f"{wrong} of {len(cases)} cases wrong, {failed} measurements failed; record: {check.path}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
