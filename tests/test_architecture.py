"""The house: imports point down only and in no circle, importing changes nothing, and the core needs torch alone."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import cbsa_torch
from cbsa_torch._core.optional import EXTRAS

SOURCE = Path(cbsa_torch.__file__).parent
ROOT = Path(__file__).parents[1]


class Layer(NamedTuple):
    below: str
    """Packages of ours that this one may import, separated by spaces."""
    others: str = ""
    """What else it may import besides torch and Python's own modules."""


LAYERS = {
    "_core": Layer(""),
    "ops": Layer("_core", "triton"),
    "nn": Layer("ops _core"),
    "parallel": Layer("nn ops _core"),
    "images": Layer("_core", "numpy PIL"),
    "models": Layer("nn ops _core", "timm safetensors huggingface_hub transformers onnxruntime onnxscript"),
    "streaming": Layer("models nn ops _core", "numpy PIL timm safetensors huggingface_hub"),
    "interpret": Layer("images nn ops _core", "numpy PIL matplotlib jinja2"),
    "bench": Layer("models nn ops _core", "timm matplotlib nystrom_attention"),
    "train": Layer(
        "images models parallel nn ops _core",
        "numpy PIL timm safetensors huggingface_hub torchvision accelerate torchmetrics sklearn scipy yaml rich tyro h5py",
    ),
    "cli": Layer(
        "bench train streaming interpret images models nn ops _core",
        "numpy PIL timm safetensors yaml rich tyro matplotlib",
    ),
}
TORCH = {"torch", "typing_extensions"}  # the second comes with torch
MODULES = {
    ".".join(("cbsa_torch", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}


def imports(path):
    """The modules that a file imports, anywhere in it; of ours, those whose code it asks for."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


IMPORTS = {name: set(imports(path)) for name, path in MODULES.items()}


def test_imports_point_down():
    wrong = []
    for importer, names in IMPORTS.items():
        room = importer.split(".")[1] if importer != "cbsa_torch" else None
        if room not in LAYERS:
            continue
        ours, others = {room, *LAYERS[room].below.split()}, TORCH | set(LAYERS[room].others.split())
        for name in names - {"cbsa_torch"}:
            first, _, rest = name.partition(".")
            if first == "cbsa_torch":
                second = rest.partition(".")[0]
                allowed = second in ours or second not in LAYERS
            else:
                allowed = first in others or first in sys.stdlib_module_names
            if not allowed:
                wrong.append(f"{importer} imports {name}")
    assert not wrong


def test_every_package_is_a_layer():
    assert {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(LAYERS)


def test_no_import_circle():
    """Imports within functions count, and a package is its ``__init__``."""
    graph = {name: names & set(MODULES) - {name} for name, names in IMPORTS.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


# ---- the extras


def declared(extra):
    """The packages of ours and of an extra, as pyproject.toml has them."""
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = set()
    for text in tables["optional-dependencies"][extra]:
        name = text.split(">=")[0].strip()
        if name.startswith("cbsa-torch["):
            found |= {n for part in name[len("cbsa-torch[") : -1].split(",") for n in declared(part)}
        else:
            found.add(name)
    return found


def distribution_names(modules):
    others = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    return {others.get(module, module).replace("_", "-") for module in modules}


@pytest.mark.parametrize(
    ("extra", "package"),
    [
        *(("models", "models"), ("streaming", "streaming"), ("interpret", "interpret"), ("train", "train")),
        *(("all", "bench"), ("all", "cli")),
    ],
)
def test_an_extra_declares_what_its_package_imports(extra, package):
    layers = [package, *LAYERS[package].below.split()]
    where_wanted = {
        "triton",
        "nystrom_attention",
        "h5py",
        "transformers",
        "onnxruntime",
        "onnxscript",
    }  # whoever asks for what needs them is told to install them
    modules = {module for layer in layers for module in LAYERS[layer].others.split()} - where_wanted
    assert distribution_names(modules) <= declared(extra)


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_an_extra_is_known_by_is_what_it_installs(extra):
    assert distribution_names(EXTRAS[extra]) <= declared(extra)


# ---- in a fresh process


def run(*args):
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


BARE = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # Python finds none of them
import torch, cbsa_torch
assert cbsa_torch.CBSA(8, 2)(torch.randn(1, 9, 8)).shape == (1, 9, 8)
rates = cbsa_torch.interpret.measure_rates(cbsa_torch.CBSA(8, 2), [torch.randn(2, 9, 8)])
assert rates.coding.images == 2
assert "triton" not in sys.modules
for use in (lambda: cbsa_torch.models, lambda: cbsa_torch.interpret.report, lambda: cbsa_torch.train):
    try:
        use()
    except ImportError as error:
        print(error)
"""


def test_without_extras_the_core_works_and_the_rest_says_what_to_install():
    packages = {name for layer in LAYERS.values() for name in layer.others.split()} - {"triton"}
    messages = run("-c", BARE, *packages).splitlines()
    assert len(messages) == 3
    for extra, message in zip(("models", "interpret", "train"), messages, strict=True):
        assert f"pip install 'cbsa-torch[{extra}]'" in message


LOADS = """
import sys, torch
before = set(sys.modules)
import cbsa_torch
print(*set(sys.modules) - before)
"""


def test_importing_loads_nothing_but_torch():
    """Nor gives a warning. How long it takes: ``scripts/import_time.py``."""
    loaded = {name.partition(".")[0] for name in run("-W", "error", "-c", LOADS).split()}
    assert "cbsa_torch" in loaded
    assert loaded - sys.stdlib_module_names <= {"cbsa_torch", "torch"}


def test_importing_changes_nothing_outside():
    """But timm's registry and torch's counter of FLOPs, which is what importing the models is for."""
    ours = sorted(name for name in MODULES if not name.endswith("__main__"))
    others = sorted({n for names in IMPORTS.values() for n in names if n.split(".")[0] != "cbsa_torch"})
    assert json.loads(run("-m", "tests.helpers.importing", json.dumps([others, ours]))) == {}


def test_public_names():
    assert cbsa_torch.__version__
    for name in cbsa_torch.__all__:
        assert hasattr(cbsa_torch, name)
    assert {"models", "interpret", "train", "adapt_vit"} <= set(dir(cbsa_torch))
    assert cbsa_torch.adapt_vit is cbsa_torch.models.adapt_vit
    with pytest.raises(AttributeError, match="no attribute 'modles'"):
        cbsa_torch.modles  # noqa: B018
