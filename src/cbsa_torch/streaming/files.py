"""Files of a stream: tokens between layers, arrays of results, and the state that it goes on from.

All are read and written by plain calls, not mapped, so that what the process holds is what it was given.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from cbsa_torch._core.files import remove_temporary_files, write_atomically

STATE, LOCK, OWNER = "state.safetensors", "lock", "stream.lock"


class StreamError(RuntimeError):
    """A stream cannot begin or go on: its files, its source or the disk are not as they must be.

    Examples:
        >>> import numpy as np, timm
        >>> from cbsa_torch.streaming import StreamError, stream
        >>> model = timm.create_model("cbt_nano_patch4_32", depth=1).eval()
        >>> result = stream(model, np.zeros((32, 32, 3), np.uint8), "here")
        >>> try:
        ...     stream(model, np.zeros((64, 64, 3), np.uint8), "here")
        ... except StreamError as error:
        ...     print("another" in str(error))
        True
    """


class Rows:
    """A file of ``(rows, numbers)``, of one dtype.

    Args:
        path: of the file, created where there is none.
        numbers: in a row.
        dtype: of the file; rows are converted.
    """

    def __init__(self, path: Path, numbers: int, dtype: torch.dtype) -> None:
        self.path, self.numbers, self.dtype = path, numbers, dtype
        path.touch()
        self.file = path.open("r+b", buffering=0)
        self.written = False

    def read(self, place: slice) -> Tensor:
        """``(1, T, numbers)`` of the rows in ``place``, in the dtype of the file."""
        rows = torch.empty(1, place.stop - place.start, self.numbers, dtype=self.dtype)
        self.file.seek(place.start * self.numbers * self.dtype.itemsize)
        into = _bytes(rows.view(-1).view(torch.uint8).numpy())
        while into:
            count = self.file.readinto(into)
            if not count:
                raise StreamError(f"{self.path} is shorter than it was written; begin anew in another folder")
            into = into[count:]
        return rows

    def write(self, first: int, rows: Tensor) -> None:
        """Write ``(1, T, numbers)`` from the row ``first`` on."""
        data = rows.to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8).numpy()
        self.written = True
        _write(self.file, self.path, first * self.numbers * self.dtype.itemsize, _bytes(data))

    def complete(self) -> None:
        """Close the file, once rows that were written are on the disk: the machine may stop, too."""
        if self.written:
            _sync(self.file, self.path)
        self.file.close()


class ArrayFile:
    """An array of NumPy (``.npy``) that is written in parts, and has its name only when it is complete.

    Args:
        path: of the file.
        shape, dtype: of the array.
    """

    def __init__(self, path: Path, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.path, self.shape, self.dtype = path, tuple(shape), dtype
        self.part = path.with_name(f"{path.name}.part")
        self.part.touch()
        self.file = self.part.open("r+b", buffering=0)
        header = BytesIO()
        described = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(
            header, {"descr": described, "fortran_order": False, "shape": self.shape}
        )
        self.start = header.tell()
        _write(self.file, self.part, 0, memoryview(header.getvalue()))

    def write(self, first: int, values: np.ndarray[Any, Any]) -> None:
        """Write values in order of memory, from the number ``first`` of the array on."""
        data = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8)
        _write(self.file, self.part, self.start + first * self.dtype.itemsize, _bytes(data))

    def complete(self) -> None:
        """Give the array its name, once it is on the disk."""
        _sync(self.file, self.part)
        self.file.close()
        self.part.replace(self.path)


def _bytes(data: Any) -> memoryview:
    """Those of an array of NumPy."""
    return memoryview(data)


def _write(file: Any, path: Path, position: int, data: memoryview) -> None:
    with told_when_full(path):
        file.seek(position)
        while len(data):
            data = data[file.write(data) :]


def _sync(file: Any, path: Path) -> None:
    with told_when_full(path):
        os.fsync(file.fileno())


@contextmanager
def told_when_full(path: Path) -> Iterator[None]:
    """Raise StreamError where the disk of ``path`` is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StreamError(
            f"the disk is full at {path}: make room and call again, which goes on from the last finished sweep"
        ) from None


class Lock:
    """A file that one stream holds at a time, also of those of one process; where the disk has no locks, all.

    Args:
        path: of the file, created where there is none. What is in it stays.

    Raises:
        StreamError: another stream holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("a+b", buffering=0)
        try:
            fcntl: Any = importlib.import_module("fcntl")
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
            self.close()
            raise StreamError(f"another stream writes to {path.parent}; wait until it ends") from None

    def close(self) -> None:
        """Let others have it."""
        self.file.close()

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
        self.close()


class Owner(Lock):
    """Whose results a folder holds while they are made: the stream that began last.

    Streams with scratch files in several folders may be told to write to one, and a stream that goes on to
    write to another than before.

    Args:
        folder: of the results.
        state: of the stream.

    Raises:
        StreamError: they are those of another stream, which may be at work.
    """

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder / OWNER)
        try:
            self._own(state)
        except BaseException:
            self.close()
            raise

    def _own(self, state: State) -> None:
        if state.finished == 0:  # nothing was written
            self.file.truncate(0)
            _write(self.file, self.path, 0, memoryview(state.name.encode()))
            return
        self.file.seek(0)
        if self.file.read() != state.name.encode():
            raise StreamError(
                f"the scratch files in {state.folder} are of a stream into another folder than "
                f"{self.path.parent}, or one that was begun there later; give that folder, or another scratch"
            )


class State:
    """What a stream goes on from, in a folder of scratch files that is its own.

    The folder holds nothing else: one with other files, or of another stream, is refused.

    Args:
        folder: of the scratch files, created where there is none.
        fingerprint: what the stream is of, in parts: a part that differs is named.

    Attributes:
        finished: sweeps that are done. tensors: what the next ones need beside the tokens.
        name: of this stream alone, by which its results are known.

    Raises:
        StreamError: a folder that is not its own, or that another stream writes to.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, str]) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.finished, self.tensors = 0, dict[str, Tensor]()
        self.name = uuid.uuid4().hex
        self.path = folder / STATE
        if folder.exists() and not folder.is_dir():
            raise StreamError(f"scratch must be a folder, and {folder} is a file")
        own = (LOCK, f".{STATE}.")  # of a stream that was killed before its first state
        others = [p.name for p in folder.iterdir() if not p.name.startswith(own)] if folder.is_dir() else []
        if others and not self.path.is_file():
            raise StreamError(
                f"scratch must be an empty folder, or one of this stream; {folder} holds {others[0]}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = Lock(folder / LOCK)
        try:
            if self.path.is_file():
                remove_temporary_files(folder)
                self._load()
            else:
                self.save(0, {})
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        data = self.path.read_bytes()
        try:
            self.tensors = load(data)
            length = int.from_bytes(data[:8], "little")
            record = json.loads(data[8 : 8 + length])["__metadata__"]
            theirs, finished = json.loads(record["fingerprint"]), int(record["finished"])
            self.name = str(record["name"])
        except Exception as error:  # whatever is wrong with a file that another program wrote
            raise StreamError(f"{self.path} is not the state of a stream ({error}); remove it") from None
        differ = differences(theirs, self.fingerprint)
        if differ:
            raise StreamError(
                f"{self.folder} was begun with another {' and '.join(differ)}: it cannot go on with this one; "
                "remove the folder, or give another"
            )
        self.finished = finished

    def save(self, finished: int, tensors: dict[str, Tensor]) -> None:
        """Note that so many sweeps are done, all or nothing."""
        record = {
            "fingerprint": json.dumps(self.fingerprint),
            "finished": str(finished),
            "name": self.name,
        }
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with told_when_full(self.path):
            write_atomically(self.path, save(own, record))
        self.finished, self.tensors = finished, tensors

    def close(self) -> None:
        """Let other processes have the folder."""
        self.lock.close()

    def remove(self, files: Iterable[Path]) -> None:
        """Remove the folder, with these files of it."""
        for path in (*files, self.path):
            path.unlink(missing_ok=True)
        self.lock.remove()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def differences(theirs: dict[str, str], ours: dict[str, str]) -> list[str]:
    """The parts in which two fingerprints differ."""
    return [part for part in ours if theirs.get(part) != ours[part]]


def check_space(needs: Sequence[tuple[Path, int, Iterable[Path]]]) -> None:
    """Raise ``StreamError`` unless the disks have room.

    Args:
        needs: folders, the bytes to be written there, and files among them that may be there already.
    """
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, size, files in needs:
        held = sum(path.stat().st_size for path in files if path.exists())
        disk = folder.stat().st_dev
        by_disk[disk] = (folder, by_disk.get(disk, (folder, 0))[1] + max(size - held, 0))
    for folder, size in by_disk.values():
        free = shutil.disk_usage(folder).free
        if free < size:
            raise StreamError(f"{folder} needs {size / 1e9:.3g} GB, and its disk has {free / 1e9:.3g} GB free")
