"""NumPy arrays out of pickles, without unpickling.

A pickle is a program. ``pickletools.genops`` only lists its instructions; an array of integers, pickled with
protocol 4, is one known list of them with four gaps: shape, kind of number, byte order, bytes. That list is
compared instruction by instruction and the gaps are read; anything else is refused. Nothing is looked up,
imported or called.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from cbsa_torch.train.errors import DataError

_BOOKKEEPING = {"PROTO", "FRAME", "MEMOIZE"}
"""Instructions without a meaning of their own."""

_KINDS = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2"), "int"),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE"), "str"),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), "bytes"),
}

Instruction = tuple[str, Any]

_NEW_ARRAY: list[Instruction] = [
    ("str", "_reconstruct"),
    ("STACK_GLOBAL", None),
    *(("str", "numpy"), ("str", "ndarray"), ("STACK_GLOBAL", None)),
    *(("int", 0), ("TUPLE1", None), ("bytes", b"b"), ("TUPLE3", None), ("REDUCE", None)),
    *(("MARK", None), ("int", 1)),  # version of the state; the shape follows
]
_DTYPE: list[Instruction] = [("BINGET", 3), ("str", "dtype"), ("STACK_GLOBAL", None)]  # 3: "numpy"
_DTYPE_STATE: list[Instruction] = [
    *(("NEWFALSE", None), ("NEWTRUE", None), ("TUPLE3", None), ("REDUCE", None)),
    *(("MARK", None), ("int", 3)),  # version of the state; the byte order follows
]
_NO_FIELDS: list[Instruction] = [
    *(("NONE", None), ("NONE", None), ("NONE", None)),
    *(("int", -1), ("int", -1), ("int", 0), ("TUPLE", None), ("BUILD", None)),
    ("NEWFALSE", None),  # rows first; the bytes follow
]
_END: list[Instruction] = [("TUPLE", None), ("BUILD", None), ("STOP", None)]


def read_pickled_array(data: bytes, name: str) -> np.ndarray:
    """Read an array of integers of one to three axes.

    Args:
        data: a pickle of protocol 4.
        name: what to call it in an error.

    Raises:
        DataError: the pickle is broken, or is anything but one such array.
    """
    stream = io.BytesIO(data)
    instructions = _instructions(stream, name)
    module = next(instructions)
    if module not in (("str", "numpy.core.multiarray"), ("str", "numpy._core.multiarray")):
        raise _not_an_array(name, module)
    _expect(instructions, _NEW_ARRAY, name)
    shape = _shape(instructions, name)
    _expect(instructions, _DTYPE, name)
    code = _value(instructions, "str", name)
    _expect(instructions, _DTYPE_STATE, name)
    order = _value(instructions, "str", name)
    _expect(instructions, _NO_FIELDS, name)
    content = _value(instructions, "bytes", name)
    _expect(instructions, _END, name)
    if not re.fullmatch("[iu][1248]", code) or order not in ("<", ">", "|"):
        raise DataError(f"{name} holds numbers of kind {order}{code}; only integers are read")
    dtype = np.dtype(order + code)
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise DataError(f"{name} holds {len(content)} bytes, which is not an array {shape} of {dtype}")
    if stream.read(1):
        raise DataError(f"{name} goes on after its array")
    return np.frombuffer(content, dtype).reshape(shape)


def _instructions(stream: io.BytesIO, name: str) -> Iterator[Instruction]:
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name not in _BOOKKEEPING:
                yield _KINDS.get(opcode.name, opcode.name), argument
    except Exception as error:  # a broken pickle raises ValueError, UnicodeDecodeError, struct.error, ...
        raise DataError(f"{name} is not a whole pickle: {error}") from error
    raise DataError(f"{name} is not a pickled NumPy array of integers: it ends early")


def _expect(instructions: Iterator[Instruction], expected: list[Instruction], name: str) -> None:
    for wanted in expected:
        got = next(instructions)
        if got != wanted:
            raise _not_an_array(name, got)


def _value(instructions: Iterator[Instruction], kind: str, name: str) -> Any:
    got = next(instructions)
    if got[0] != kind:
        raise _not_an_array(name, got)
    return got[1]


def _shape(instructions: Iterator[Instruction], name: str) -> tuple[int, ...]:
    sizes: list[int] = []
    for got in instructions:
        if got[0] == "int" and got[1] >= 0 and len(sizes) < 3:
            sizes.append(got[1])
        elif sizes and got == (f"TUPLE{len(sizes)}", None):
            break
        else:
            raise _not_an_array(name, got)
    return tuple(sizes)


def _not_an_array(name: str, got: Instruction) -> DataError:
    return DataError(
        f"{name} is not a pickled NumPy array of integers: unexpected {got[0]} {str(got[1])[:40]!r}; "
        "nothing of it was executed"
    )
