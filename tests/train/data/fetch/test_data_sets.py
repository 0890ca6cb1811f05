from __future__ import annotations

import numpy as np
import pytest

from cbsa_torch.cli import main
from cbsa_torch.train.config.base import DataConfig
from cbsa_torch.train.data import open_split, open_splits
from cbsa_torch.train.data.fetch import DATA_SETS, animals28, data_folder, fetch, load
from cbsa_torch.train.data.fetch.archive import checksum
from cbsa_torch.train.data.fetched import over_grey
from cbsa_torch.train.errors import ConfigError, DataError


def test_the_data_set_is_built_from_the_package(animals_file, animals, tmp_path):
    path = fetch("animals28", tmp_path / "new" / "data")
    assert path == tmp_path / "new" / "data" / "animals28.npz"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with np.load(path, allow_pickle=False) as file:
        rows = np.concatenate([file[f"{split}_row"] for split in ("train", "val", "test")])
        images = np.concatenate([file[f"{split}_x"] for split in ("train", "val", "test")])
    np.testing.assert_array_equal(images, animals[0][rows])


def test_the_same_arrays_make_the_same_file(animals_file, tmp_path):
    assert fetch("animals28", tmp_path / "a").read_bytes() == fetch("animals28", tmp_path / "b").read_bytes()


def test_what_is_there_is_not_fetched_again(animals_file, tmp_path):
    path = fetch("animals28", tmp_path)
    written = path.stat().st_mtime_ns
    animals_file.unlink()
    assert fetch("animals28", tmp_path) == path
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_file_is_refused_and_replaced(animals_file, tmp_path, damage):
    path = fetch("animals28", tmp_path)
    whole = path.read_bytes()
    broken = {
        "truncated": whole[:-1000],
        "flipped": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "empty": b"",
    }
    if damage == "other":
        np.savez(path, train_x=np.zeros(3))
    else:
        path.write_bytes(broken[damage])
    with pytest.raises(DataError, match=r"animals28\.npz.*; get it again with: cbsa data fetch animals28"):
        load("animals28", tmp_path)
    fetch("animals28", tmp_path)
    assert path.read_bytes() == whole


def test_a_source_needs_no_network(animals_file, tmp_path):
    moved = animals_file.rename(tmp_path / "renamed.bin")
    assert fetch("animals28", tmp_path / "data", [moved]).exists()


def test_what_was_downloaded_before_a_failure_is_not_downloaded_again(emoji_files, tmp_path):
    first, second = emoji_files
    folder = tmp_path / "data"
    hidden = second.rename(tmp_path / "hidden")
    with pytest.raises(DataError, match="cannot download"):
        fetch("emoji64", folder)
    (kept,) = folder.iterdir()
    assert kept.read_bytes() == first.read_bytes()
    first.unlink()
    hidden.rename(second)
    fetch("emoji64", folder)
    assert [path.name for path in folder.iterdir()] == ["emoji64.npz"]


def test_a_damaged_file_of_an_earlier_attempt_is_downloaded_again(emoji_files, tmp_path):
    hidden = emoji_files[1].rename(tmp_path / "hidden")
    with pytest.raises(DataError, match="cannot download"):
        fetch("emoji64", tmp_path / "data")
    (kept,) = (tmp_path / "data").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    hidden.rename(emoji_files[1])
    fetch("emoji64", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["emoji64.npz"]


def test_a_source_in_the_data_folder_stays(emoji_files, tmp_path):
    (tmp_path / "data").mkdir()
    sources = [path.rename(tmp_path / "data" / path.name) for path in emoji_files]
    fetch("emoji64", tmp_path / "data", sources)
    assert all(path.exists() for path in sources)


def test_unexpected_arrays_are_not_written(animals_file, tmp_path, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "animals28", DATA_SETS["animals28"]._replace(checksum="0" * 64))
    with pytest.raises(
        DataError, match="the arrays built for animals28 have the checksum .* nothing was written"
    ):
        fetch("animals28", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_the_download(animals_file, tmp_path):
    animals_file.unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write into .*file.*--output or .*CBSA_DATA"):
        fetch("animals28", tmp_path / "file" / "data")


def test_a_full_disk_leaves_nothing_behind(animals_file, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cbsa_torch._core.files.os.fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*animals28\.npz: No space left"):
        fetch("animals28", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(DataError, match=r"no data set 'animal28'; did you mean 'animals28'\?"):
        fetch("animal28")


def test_the_default_folder_is_that_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CBSA_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    assert data_folder("here").name == "here"
    monkeypatch.delenv("CBSA_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data_folder() == tmp_path / "home" / ".cache" / "cbsa_torch"


def test_the_checksum_sees_names_kinds_shapes_and_values():
    array = np.arange(6, dtype=np.uint8)
    variants = [
        {"a": array},
        {"b": array},
        {"a": array.astype(np.int8)},
        {"a": array.reshape(2, 3)},
        {"a": array[::-1]},
        {"a": array, "b": array},
    ]
    assert len({checksum(v) for v in variants}) == len(variants)
    assert checksum({"a": array, "b": array}) == checksum({"b": array.copy(), "a": array})
    big = np.arange(6, dtype=">i4")
    assert checksum({"a": big}) == checksum({"a": big.astype("<i4")})
    assert checksum({"a": array.reshape(2, 3).T}) == checksum(
        {"a": np.ascontiguousarray(array.reshape(2, 3).T)}
    )


# ---- in training


def test_the_trainer_opens_the_splits_as_stored(animals_file, tmp_path, monkeypatch):
    monkeypatch.setenv("CBSA_DATA", str(tmp_path))
    arrays = np.load(fetch("animals28"))
    splits = open_splits(DataConfig(name="animals28"), "L")
    assert splits.class_names == animals28.CLASS_NAMES
    for name, part in zip(("train", "val", "test"), splits[:3], strict=True):
        assert [label for _, label in part] == arrays[f"{name}_y"].tolist()
        np.testing.assert_array_equal(np.asarray(part[3][0]), arrays[f"{name}_x"][3])
        assert part[0][0].mode == "L"
    assert open_splits(DataConfig(name="animals28"), "RGB").val[0][0].mode == "RGB"
    assert len(open_split(DataConfig(name="animals28"), "L", "test", animals28.CLASS_NAMES)) == 1000


def test_without_the_file_the_trainer_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CBSA_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"not at .*emoji64\.npz; get it with: cbsa data fetch emoji64$"):
        open_splits(DataConfig(name="emoji64"), "RGB")
    with pytest.raises(DataError, match=r"cbsa data fetch animals28 --output .*there$"):
        open_splits(DataConfig(name="animals28", root=str(tmp_path / "there")), "L")


def test_a_name_close_to_a_data_set_is_suggested():
    with pytest.raises(ConfigError, match="did you mean 'animals28'"):
        open_splits(DataConfig(name="animals"), "L")


def test_both_drawings_of_an_emoji_are_in_one_split(emoji_files, tmp_path):
    arrays = np.load(fetch("emoji64", tmp_path))
    splits = open_splits(DataConfig(name="emoji64", root=str(tmp_path)), "RGB")
    assert [len(part) for part in splits[:3]] == [84, 18, 18]
    assert splits.class_names == arrays["category_names"].tolist()
    first = int(np.nonzero(arrays["split"] == 1)[0][0])
    for vendor, index in (("google", 0), ("twitter", 9)):
        image, label = splits.val[index]
        np.testing.assert_array_equal(np.asarray(image), over_grey(arrays[vendor][first : first + 1])[0])
        assert label == arrays["label"][first]


def test_drawings_are_laid_over_mid_grey():
    generator = np.random.default_rng(0)
    drawings = generator.integers(0, 256, (2, 8, 8, 4), dtype=np.uint8)
    drawings[0, 0, 0], drawings[0, 0, 1] = (255, 255, 255, 255), (9, 9, 9, 0)
    alpha = drawings[..., 3:] / 255
    expected = drawings[..., :3] * alpha + 128 * (1 - alpha)
    got = over_grey(drawings)
    assert got.dtype == np.uint8
    assert np.abs(got - expected).max() <= 0.5
    assert got[0, 0, 0].tolist() == [255] * 3
    assert got[0, 0, 1].tolist() == [128] * 3


# ---- the command


def test_the_command_fetches_and_says_how_to_train(animals_file, tmp_path, capsys):
    assert main(["data", "fetch", "animals28", "--output", str(tmp_path / "data")]) == 0
    assert (tmp_path / "data" / "animals28.npz").exists()
    out = capsys.readouterr().out
    assert f"downloading {animals_file.as_uri()}" in out
    assert "licence: MIT" in out
    assert f"cbsa train --config animals28 --data.root {tmp_path / 'data'}" in out


def test_the_command_takes_several_sources(emoji_files, tmp_path, capsys):
    sources = [str(path.rename(tmp_path / f"{i}.tgz")) for i, path in enumerate(emoji_files)]
    assert main(["data", "fetch", "emoji64", "--output", str(tmp_path), "--source", *sources]) == 0
    assert "downloading" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["emoji63"], "did you mean 'emoji64'"),
        (["animals28", "--source", "nowhere.whl"], "cannot read --source nowhere.whl"),
        (["animals28", "--output", "file/data"], "cannot write into file/data"),
    ],
)
def test_what_fetch_refuses_is_one_line_and_exit_code_1(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CBSA_DATA", str(tmp_path / "data"))
    (tmp_path / "file").write_text("")
    assert main(["data", "fetch", *args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("cbsa: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("args", [[], ["fetch"], ["fetc", "animals28"]])
def test_an_incomplete_command_is_a_usage_error(args, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data", *args])
    assert caught.value.code == 2
    assert "fetch" in capsys.readouterr().err


def test_the_recipe_trains_on_the_fetched_data(animals_file, tmp_path, monkeypatch):
    monkeypatch.setenv("CBSA_DATA", str(tmp_path))
    fetch("animals28")
    run = tmp_path / "run"
    tiny = ["--model.args", "embed_dim", "16", "depth", "1", "num_heads", "2", "num_representatives", "4"]
    options = ["--optim.epochs", "1", "--engine.threads", "1", "--output", str(run)]
    assert main(["train", "--config", "animals28", *options, *tiny]) == 0
    assert main(["eval", "--checkpoint", str(run), "--split", "test"]) == 0
    assert (run / "eval_test.json").exists()
