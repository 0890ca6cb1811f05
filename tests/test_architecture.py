"""The house: imports point down only, and the core needs torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cbsa_torch

SOURCE = Path(cbsa_torch.__file__).parent

# folder -> folders of ours it may import
ALLOWED = {
    "_core": set(),
    "ops": {"_core"},
    "nn": {"ops", "_core"},
    "models": {"nn", "ops", "_core"},
    "interpret": {"nn", "ops", "_core"},
    "bench": {"models", "nn", "ops", "_core"},
    "train": {"models", "nn", "ops", "_core"},
    "cli": {"bench", "train", "interpret", "models", "nn", "ops", "_core"},
}
TORCH_ONLY = {"_core", "ops", "nn"}
FILES = sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "cbsa_torch":
                yield from (f"cbsa_torch.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    room = path.relative_to(SOURCE).parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "cbsa_torch" and len(parts) > 1 and parts[1] in ALLOWED:
            assert parts[1] == room or parts[1] in ALLOWED[room], f"{room} must not import {name}"
        elif room in TORCH_ONLY and parts[0] != "cbsa_torch":
            allowed = {"torch", "typing_extensions"} | sys.stdlib_module_names  # the second comes with torch
            if path.parent.name == "triton":  # imported at first use only
                allowed |= {"triton"}
            assert parts[0] in allowed, f"{room} must not import {name}"


def test_every_room_is_in_the_plan():
    rooms = {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms == set(ALLOWED)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {extras}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
EXTRAS = {
    "timm",
    "torchvision",
    "accelerate",
    "matplotlib",
    "jinja2",
    "sklearn",
    "torchmetrics",
    "rich",
    "tyro",
    "yaml",
}


def test_the_bare_package_needs_torch_alone():
    code = BLOCK.format(extras=EXTRAS) + (
        "import torch, cbsa_torch\n"
        "assert cbsa_torch.CBSA(8, 2)(torch.randn(1, 9, 8)).shape == (1, 9, 8)\n"
        "assert not {'timm', 'accelerate', 'matplotlib', 'triton'} & set(sys.modules)\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("module", "extra"), [("models", "models"), ("interpret", "interpret"), ("train", "train")]
)
def test_a_missing_extra_says_what_to_install(module, extra):
    # find_spec of a blocked package must behave as if it were not installed
    code = (
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        f"u.find_spec = lambda name, package=None: None if name in {EXTRAS} else real(name, package)\n"
        "import cbsa_torch\n"
        "try:\n"
        f"    cbsa_torch.{module}\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    result = run(code)
    assert f"pip install 'cbsa-torch[{extra}]'" in result.stdout, result.stderr


def test_public_names():
    assert cbsa_torch.__version__
    for name in cbsa_torch.__all__:
        assert hasattr(cbsa_torch, name)
    assert {"models", "interpret", "train", "adapt_vit"} <= set(dir(cbsa_torch))
    assert cbsa_torch.adapt_vit is cbsa_torch.models.adapt_vit
    with pytest.raises(AttributeError, match="no attribute 'modles'"):
        cbsa_torch.modles  # noqa: B018
