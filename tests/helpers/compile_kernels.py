"""Compile the Triton kernels as they are launched, without a GPU; the interpreter accepts more than compilers do.

``python -m tests.helpers.compile_kernels CAPABILITY [KERNEL ...]`` prints, for each launch of a forward and a
backward pass, registers per thread, bytes spilled per thread and shared memory per program.
TRITON_INTERPRET must be 0.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

DTYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}


class Recorder:
    """Stands for the kernels' module: notes launches, computes nothing."""

    def __init__(self):
        self.launches = []

    def __getattr__(self, name):
        recorder = self

        class Kernel:
            def __getitem__(self, grid):
                return lambda *args, **kwargs: recorder.launches.append((name, args, kwargs))

        return Kernel()


def launches(dtype, m, p, separate=False, masked=False, b=2, h=2, n=4096):
    """What one forward and one backward pass launch: kernel name, arguments, keyword arguments."""
    from cbsa_torch.ops.cbsa import driver
    from cbsa_torch.ops.cbsa.triton import passes

    recorder = Recorder()
    passes.check_supported = lambda keys, m: None
    passes.kernels, passes._interpreted = recorder, lambda: False
    passes._processors = lambda device: 132
    storage = torch.zeros(b, n, 2 * h, p, dtype=dtype).transpose(1, 2)  # (B, 2 H, N, P)
    keys, values = storage[:, :h], storage[:, h:] if separate else None
    mask = torch.ones(b, n, dtype=torch.bool) if masked else None
    representatives, steps = torch.zeros(b, h, m, p, dtype=dtype), (torch.ones(h), torch.ones(h))
    tensors = representatives, keys, values, *steps, mask, *[None] * 7
    problem = driver.Problem(*tensors, "softmax", p**-0.5, 0.1, "triton")
    driver.backward(*driver.forward(problem), problem)
    return recorder.launches


def describe(value):
    """Triton's type of an argument, specialised as at a launch: None, 1 and multiples of 16 are known."""
    if isinstance(value, tuple):
        return tuple(describe(part) for part in value)
    if isinstance(value, torch.Tensor):
        return DTYPES[value.dtype]
    if value is None or value == 1:
        return "constexpr"
    return "fp32" if isinstance(value, float) else "i32"


def compile_launch(name, args, kwargs, capability):
    """Registers, spilled bytes and shared memory of one launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cbsa_torch.ops.cbsa.triton import kernels

    function = getattr(kernels, name)
    kwargs = dict(kwargs)
    options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
    values = {**dict(zip(function.arg_names, args, strict=False)), **kwargs}
    constexprs = {parameter.name for parameter in function.params if parameter.is_constexpr}
    signature, constants, attributes = {}, {}, {}

    def note(path, value, kind):
        if isinstance(kind, tuple):
            for i, part in enumerate(kind):
                note((*path, i), value[i], part)
        elif kind == "constexpr":
            constants[path] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]

    for i, key in enumerate(function.arg_names):
        signature[key] = "constexpr" if key in constexprs else describe(values[key])
        note((i,), values[key], signature[key])
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    return {"registers": int(registers), "spilled": int(stack), "shared": compiled.metadata.shared}


def main(capability, *names):
    for name, args, kwargs in launches(torch.bfloat16, m=64, p=64):
        if name in names or not names:
            print(json.dumps({"kernel": name, **compile_launch(name, args, kwargs, int(capability))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
