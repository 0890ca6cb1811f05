"""Files of a stream: only its own are used, and a disk that is full is told."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cbsa_torch.streaming import StreamError, files
from cbsa_torch.streaming.files import Rows, State, check_space, told_when_full

PARTS = {"model": "a", "image": "b"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_come_back(dtype, tmp_path):
    rows, values = Rows(tmp_path / "rows", 3, dtype), torch.randn(1, 5, 3).to(dtype)
    rows.write(4, values)
    assert torch.equal(rows.read(slice(6, 9)), values[:, 2:])
    with pytest.raises(StreamError, match="shorter"):
        rows.read(slice(8, 10))
    rows.complete()


def test_the_state_is_of_one_stream(tmp_path):
    state = State(tmp_path / "scratch", PARTS)
    state.save(2, {"layer.picked": torch.arange(3.0)})
    state.close()
    again = State(tmp_path / "scratch", PARTS)
    assert again.finished == 2
    assert torch.equal(again.tensors["layer.picked"], torch.arange(3.0))
    again.close()
    with pytest.raises(StreamError, match="begun with another image"):
        State(tmp_path / "scratch", {**PARTS, "image": "c"})
    again.remove([])
    assert not (tmp_path / "scratch").exists()


def test_a_folder_of_others_is_refused(tmp_path):
    (tmp_path / "tokens-0.bin").write_bytes(b"0")
    with pytest.raises(StreamError, match=r"holds tokens-0\.bin"):
        State(tmp_path, PARTS)
    (tmp_path / files.STATE).write_bytes(b"anything but a state")
    with pytest.raises(StreamError, match="not the state of a stream"):
        State(tmp_path, PARTS)
    assert (tmp_path / "tokens-0.bin").read_bytes() == b"0"
    with pytest.raises(StreamError, match="is a file"):
        State(tmp_path / "tokens-0.bin", PARTS)


def test_space_is_checked_before(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    (tmp_path / "held").write_bytes(b"0" * 500)
    check_space([(tmp_path, 1500, [tmp_path / "held"])])
    with pytest.raises(StreamError, match="needs 1.1e-06 GB, and its disk has 1e-06 GB free"):
        check_space([(tmp_path, 1500, [tmp_path / "held"]), (tmp_path, 100, [])])


def test_a_disk_that_fills_up(tmp_path):
    rows = Rows(tmp_path / "rows", 3, torch.float32)

    class Full:
        seek = staticmethod(lambda _: None)

        @staticmethod
        def write(_):
            raise OSError(errno.ENOSPC, "No space left on device")

    rows.file.close()
    rows.file = Full()
    with pytest.raises(StreamError, match=r"the disk is full at .*rows: make room and call again"):
        rows.write(0, torch.zeros(1, 1, 3))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux: every write to it finds a full disk")
def test_a_full_disk_is_told_by_the_system():
    rows = Rows(Path("/dev/full"), 3, torch.float32)
    with pytest.raises(StreamError, match="the disk is full at /dev/full"):
        rows.write(0, torch.zeros(1, 1, 3))
    rows.file.close()
    with pytest.raises(OSError, match="Not a directory"), told_when_full(Path()):
        list(Path("/dev/null").iterdir())
