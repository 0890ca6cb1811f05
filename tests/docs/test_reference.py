"""The API reference has every public name, once."""

import importlib
import inspect
import re

import pytest

from tests.helpers.doc_pages import ROOT

PACKAGES = [
    "cbsa_torch",
    "cbsa_torch.images",
    "cbsa_torch.interpret",
    "cbsa_torch.models",
    "cbsa_torch.models.adapt",
    "cbsa_torch.nn",
    "cbsa_torch.ops",
    "cbsa_torch.parallel",
    "cbsa_torch.streaming",
    "cbsa_torch.train",
    "cbsa_torch.train.tasks.segmentation",
]


def find(path):
    """The object at a dotted path."""
    for end in range(path.count(".") + 1, 0, -1):
        parts = path.split(".")
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(path)


ENTRIES = [
    path
    for page in sorted((ROOT / "docs/reference/api").glob("*.md"))
    for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]


def test_no_name_is_documented_twice():
    found = [find(path) for path in ENTRIES]
    assert len({id(entry) for entry in found}) == len(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented(package):
    documented = {id(find(path)) for path in ENTRIES}
    module = importlib.import_module(package)
    missing = [
        name
        for name in module.__all__
        if name not in ("__version__", "nn", "ops") and id(getattr(module, name)) not in documented
    ]
    assert missing == []


def test_every_entry_says_what_it_is():
    assert [path for path in ENTRIES if callable(find(path)) and not inspect.getdoc(find(path))] == []
