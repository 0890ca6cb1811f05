from __future__ import annotations

import numpy as np
import pytest

from cbsa_torch.cli import main
from cbsa_torch.train.data.fetch import DATA_SETS, data_folder, fetch, load
from cbsa_torch.train.data.fetch.data_sets import checksum
from cbsa_torch.train.errors import DataError


def test_the_data_set_is_built_from_the_package_once(animals_file, animals, tmp_path):
    path = fetch("animals28", tmp_path / "new" / "data")
    assert path == tmp_path / "new" / "data" / "animals28.npz"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    arrays = load("animals28", path.parent)
    rows, images = (
        np.concatenate([arrays[f"{s}_{part}"] for s in ("train", "val", "test")]) for part in ("row", "x")
    )
    np.testing.assert_array_equal(images, animals[0][rows])
    assert fetch("animals28", tmp_path / "other").read_bytes() == path.read_bytes()
    animals_file.unlink()
    written = path.stat().st_mtime_ns
    assert fetch("animals28", path.parent) == path
    assert path.stat().st_mtime_ns == written


def test_a_damaged_file_is_refused_and_replaced(animals_file, tmp_path):
    path = fetch("animals28", tmp_path)
    whole = path.read_bytes()
    np.savez(tmp_path / "other.npz", train_x=np.zeros(3))
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    for damaged in (whole[:-1000], flipped, b"", (tmp_path / "other.npz").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"animals28\.npz.*; get it again with: cbsa data fetch animals28"):
            load("animals28", tmp_path)
    fetch("animals28", tmp_path)
    assert path.read_bytes() == whole


def test_unexpected_arrays_and_a_full_disk_leave_nothing_behind(animals_file, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(DataError, match=r"write .*animals28\.npz: No space left"),
    ):
        patch.setattr("cbsa_torch._core.files.os.fsync", full)
        fetch("animals28", tmp_path / "data")
    monkeypatch.setitem(DATA_SETS, "animals28", DATA_SETS["animals28"]._replace(checksum="0" * 64))
    with pytest.raises(DataError, match="built for animals28 have the checksum .* nothing was written"):
        fetch("animals28", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_the_download(animals_file, tmp_path):
    animals_file.unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file/data/.*--output or .*CBSA_DATA"):
        fetch("animals28", tmp_path / "file" / "data")


def test_the_default_folder_is_that_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CBSA_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    assert data_folder("here").name == "here"
    monkeypatch.delenv("CBSA_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data_folder() == tmp_path / "home" / ".cache" / "cbsa_torch"


def test_the_checksum_sees_names_kinds_shapes_and_values_alone():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    variants = [
        {"a": array},
        {"b": array},
        {"a": array.astype(np.int8)},
        {"a": array.ravel()},
        {"a": array[::-1]},
    ]
    assert len({checksum(v) for v in [*variants, {"a": array, "b": array}]}) == 6
    assert checksum({"a": array, "b": array}) == checksum({"b": np.asfortranarray(array), "a": array})
    assert checksum({"a": array.astype(">i4")}) == checksum({"a": array.astype("<i4")})


def test_the_command_fetches_and_says_how_to_train(animals_file, emoji_files, tmp_path, capsys):
    folder = tmp_path / "data"
    assert main(["data", "fetch", "animals28", "--output", str(folder)]) == 0
    assert (folder / "animals28.npz").exists()
    out = capsys.readouterr().out
    for part in (f"downloading {animals_file.as_uri()}", "licence: MIT", f"animals28 --data.root {folder}"):
        assert part in out
    sources = [str(path.rename(tmp_path / f"{i}.tgz")) for i, path in enumerate(emoji_files)]
    assert main(["data", "fetch", "emoji64", "--output", str(folder), "--source", *sources]) == 0
    assert "downloading" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["animals28", "--source", "nowhere.whl"], "cannot read --source nowhere.whl"),
        (["animal28"], "no data set 'animal28'; did you mean 'animals28'?"),
    ],
)
def test_what_fetch_refuses_is_one_line_and_exit_code_1(args, message, tmp_path, capsys):
    assert main(["data", "fetch", *args, "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"cbsa: {message}")
    assert err.count("\n") == 1


def test_the_recipe_trains_on_the_fetched_data(animals_file, tmp_path, monkeypatch):
    monkeypatch.setenv("CBSA_DATA", str(tmp_path))
    fetch("animals28")
    run = tmp_path / "run"
    tiny = ["--model.args", "embed_dim", "16", "depth", "1", "num_heads", "2", "num_representatives", "4"]
    options = ["--optim.epochs", "1", "--engine.threads", "1", "--output", str(run)]
    assert main(["train", "--config", "animals28", *options, *tiny]) == 0
    assert main(["eval", "--checkpoint", str(run), "--split", "test"]) == 0
    assert (run / "eval_test.json").exists()
