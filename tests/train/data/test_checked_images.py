"""Unreadable images: left out, counted once, listed with their reason, and too many stop the run."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_torch.train import evaluate_checkpoint, train
from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.data import IGNORE, InputSpec, checked_images, make_loader, open_splits, read_skipped
from cbsa_torch.train.data.checked_images import SkippedImages
from cbsa_torch.train.errors import DataError
from cbsa_torch.train.losses import mean_loss

SPEC = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)


def write_image(path: Path, kind: str, size: tuple[int, int] = (32, 32)) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)


def cut(kind: str, length: int):
    def write(path: Path) -> None:
        write_image(path, kind)
        path.write_bytes(path.read_bytes()[:length])

    return write


def bomb(path: Path) -> None:
    # one bit per pixel: 400 million pixels, a file of 50 kB
    Image.new("1", (20_000, 20_000)).save(path, "PNG")


BROKEN = {
    "truncated JPEG": (cut("JPEG", 700), "truncated"),
    "JPEG cut in its header": (cut("JPEG", 20), "not an image"),
    "truncated PNG": (cut("PNG", 200), "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "not an image"),
    "text": (lambda path: path.write_text("not an image\n" * 50), "not an image"),
    "dangling link": (lambda path: path.symlink_to(path.with_name("nowhere")), "No such file"),
    "decompression bomb": (bomb, "decompression bomb"),
}


def folder(root: Path, **kwargs) -> DataConfig:
    return DataConfig(name="folder", root=str(root), **{"workers": 0, "crop_scale": (0.5, 1.0), **kwargs})


def targets(loader) -> list[int]:
    return [int(t) for _, batch in loader for t in batch]


def val_loader(data: DataConfig, skipped: Path | None = None):
    return make_loader(open_splits(data, "RGB", skipped).val, SPEC, data, 4, train=False)


def names(path: Path) -> list[str]:
    return [line.partition("\t")[0] for line in read_skipped(path)]


# ---- one bad file


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in BROKEN), ("truncated JPEG", 1)])
def test_an_unreadable_image_is_left_out_and_listed_once_with_its_reason(images, tmp_path, kind, workers):
    bad = images / "val" / "red" / "bad.jpg"
    write, reason = BROKEN[kind]
    write(bad)
    skipped = tmp_path / "run" / "skipped.txt"
    loader = val_loader(folder(images, workers=workers), skipped)
    for _ in range(2):
        assert Counter(targets(loader)) == {0: 4, 1: 4, 2: 4, IGNORE: 1}
    (line,) = read_skipped(skipped)
    assert line.startswith(f"{bad}\t")
    assert reason in line
    assert skipped.read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("name", "size"),
    [("photo.jpg", (32, 32)), ("photo.JPEG", (9, 70)), ("photo.bmp", (50, 20)), ("photo.png", (1, 1))],
)
def test_images_of_any_size_and_of_another_kind_than_their_name_are_read(images, tmp_path, name, size):
    write_image(images / "val" / "red" / name, "PNG", size)
    assert targets(val_loader(folder(images), tmp_path / "s.txt")).count(2) == 5
    assert read_skipped(tmp_path / "s.txt") == []


def test_a_file_that_may_not_be_read_is_left_out(images, tmp_path, monkeypatch):
    data = folder(images)
    dataset = open_splits(data, "RGB", tmp_path / "s.txt").val
    # the tests may run as root, whom no permission stops
    reader = dataset.reader

    class Guarded:
        def __getitem__(self, index):
            if "red_1" in reader.filename(index, absolute=True):
                raise PermissionError(13, "Permission denied")
            return reader[index]

        def __getattr__(self, name):
            return getattr(reader, name)

        def __len__(self):
            return len(reader)

    monkeypatch.setattr(dataset, "reader", Guarded())
    assert targets(make_loader(dataset, SPEC, data, 4, train=False)).count(IGNORE) == 1
    assert read_skipped(tmp_path / "s.txt") == [f"{images}/val/red/red_1.png\tPermission denied"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_may_change_while_it_is_read(images, tmp_path, workers):
    red = images / "val" / "red"
    loader = val_loader(folder(images, workers=workers), tmp_path / "s.txt")
    assert IGNORE not in targets(loader)
    (red / "red_0.png").unlink()
    (red / "red_1.png").write_bytes((red / "red_1.png").read_bytes()[:100])
    (red / "red_2.png").write_bytes(b"")
    write_image(red / "new.png", "PNG")
    assert Counter(targets(loader)) == {0: 4, 1: 4, 2: 1, IGNORE: 3}
    assert names(tmp_path / "s.txt") == [str(red / f"red_{i}.png") for i in range(3)]
    write_image(red / "red_2.png", "PNG")  # mended: read again, but still listed
    assert Counter(targets(loader)) == {0: 4, 1: 4, 2: 2, IGNORE: 2}
    shutil.rmtree(red)
    assert Counter(targets(loader)) == {0: 4, 1: 4, IGNORE: 4}
    assert len(read_skipped(tmp_path / "s.txt")) == 4


def test_a_file_that_shrinks_while_it_is_decoded_is_left_out(images, tmp_path, monkeypatch):
    """An uncompressed image, which Pillow would map into memory if it opened the file itself."""
    target = images / "val" / "red" / "large.bmp"
    write_image(target, "BMP", (500, 500))
    decode = checked_images.read_image_file

    def shrink_first(file, mode):
        if file.name.endswith("large.bmp"):
            target.write_bytes(target.read_bytes()[:5000])
        return decode(file, mode)

    monkeypatch.setattr(checked_images, "read_image_file", shrink_first)
    assert targets(val_loader(folder(images), tmp_path / "s.txt")).count(IGNORE) == 1
    assert names(tmp_path / "s.txt") == [str(target)]


def test_an_error_of_a_transform_is_not_taken_for_a_bad_image(images):
    dataset = open_splits(folder(images), "RGB").val

    def broken(image):
        raise ValueError("a bug")

    dataset.transform = broken
    with pytest.raises(ValueError, match="a bug"):
        dataset[0]


# ---- the limit


def spoil(images: Path, count: int, split: str = "val") -> list[Path]:
    bad = [images / split / "red" / f"bad_{i}.png" for i in range(count)]
    for path in bad:
        path.write_bytes(b"")
    return bad


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_one_image_more_than_the_limit_stops(images, tmp_path, workers):
    spoil(images, 3)
    skipped = tmp_path / "skipped.txt"
    data = folder(images, workers=workers, max_bad_images=3)
    assert targets(val_loader(data, skipped)).count(IGNORE) == 3
    spoil(images, 4)
    with pytest.raises(DataError) as caught:
        targets(val_loader(data, skipped))
    message = str(caught.value)
    for part in ("val/red/bad_", "not an image", "4 image(s)", str(skipped), "max_bad_images is 3"):
        assert part in message
    assert "Traceback" not in message
    assert "\n" not in message
    assert len(read_skipped(skipped)) == 4


def test_without_a_file_images_are_counted_all_the_same(images):
    spoil(images, 3)
    assert targets(val_loader(folder(images, max_bad_images=3))).count(IGNORE) == 3
    with pytest.raises(DataError, match="3 image"):
        targets(val_loader(folder(images, max_bad_images=2)))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"cannot read image .*val/red/bad_\d\.png: not an image"):
            targets(val_loader(folder(images, workers=workers, max_bad_images=0)))


def test_a_list_that_is_there_is_gone_on_with(tmp_path):
    SkippedImages(tmp_path / "s.txt", 2).add("a", "why")
    SkippedImages(tmp_path / "s.txt", 2).add("b", "why")
    SkippedImages(tmp_path / "s.txt", 2).add("a", "another reason")
    with pytest.raises(DataError, match=r"c: why; with it 3 image"):
        SkippedImages(tmp_path / "s.txt", 2).add("c", "why")


def add_many(path: Path, first: int) -> None:
    skipped = SkippedImages(path, 1000)
    for i in range(first, first + 60):
        skipped.add(f"image {i % 100}", "x" * (i % 100))


def test_processes_share_the_list(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_many, args=(tmp_path / "s.txt", first)) for first in (0, 40, 70)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    expected = [f"image {i}\t{'x' * i}" for i in range(100)]
    assert sorted(read_skipped(tmp_path / "s.txt")) == sorted(expected)


def test_every_line_is_whole(tmp_path):
    path = tmp_path / "s.txt"
    assert read_skipped(path) == []
    SkippedImages(path, 9).add(b"a\xff\n\tb\r.png".decode(errors="surrogateescape"), "two\nlines")
    assert read_skipped(path) == ["a\\xff\\n\\tb\\r.png\ttwo\\nlines"]
    path.write_bytes(b"a\twhy\nb")  # cut short by a full disk
    assert read_skipped(path) == ["a\twhy"]


# ---- loss and metrics


def test_the_loss_does_not_count_skipped_images():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, IGNORE, 2, 1, IGNORE])
    kept = labels != IGNORE
    expected = torch.nn.functional.cross_entropy(logits[kept], labels[kept], label_smoothing=0.1)
    torch.testing.assert_close(mean_loss(logits, labels, 0.1), expected)
    assert mean_loss(logits[:2], torch.tensor([IGNORE, IGNORE])) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_does_not_count_skipped_images(finished, images, tmp_path, workers):
    output = tmp_path / "clean.json"
    clean = evaluate_checkpoint(finished[1].folder, data=folder(images), output=output)
    bad = images / "test" / "blue" / "bad.png"
    BROKEN["truncated PNG"][0](bad)
    output = tmp_path / "skip.json"
    data = folder(images, workers=workers)
    result = evaluate_checkpoint(finished[1].folder, data=data, output=output, batch_size=5)
    assert result.images == sum(map(sum, result.confusion)) == 12
    assert result.confusion == clean.confusion
    assert result.top1 == clean.top1
    assert result.loss == pytest.approx(clean.loss, rel=1e-5)
    (line,) = json.loads(output.read_text())["skipped_images"]
    assert line.startswith(f"{bad}\t")


def test_evaluation_of_nothing_but_unreadable_images_is_refused(finished, images, tmp_path):
    for image in (images / "test").rglob("*.png"):
        image.write_bytes(b"")
    data = folder(images, max_bad_images=100)
    with pytest.raises(DataError, match="no image of the test split could be read"):
        evaluate_checkpoint(finished[1].folder, data=data, output=tmp_path / "e.json")


# ---- training


@pytest.mark.parametrize("workers", [0, 2])
def test_training_and_validation_share_the_limit_and_say_how_many(config, images, tmp_path, capsys, workers):
    bad = [*spoil(images, 1, "train"), *spoil(images, 1, "val")]
    config.optim.batch_size, config.data.max_bad_images, config.data.workers = 25, 2, workers
    train(config)
    assert names(tmp_path / "run" / "skipped_images.txt") == sorted(map(str, bad))
    assert "2 unreadable image(s) were left out" in capsys.readouterr().out
    spoil(images, 2, "val")
    config.output = str(tmp_path / "again")
    with pytest.raises(DataError, match="max_bad_images is 2"):
        train(config)
