"""The reference has every public name, once, and says what is to be known of it; what its pages quote is true."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from typing import NamedTuple, Protocol

import pytest
import torch
from scripts.generated_pages import field_docs, recipes, settings, settings_of

from cbsa_torch.train.config import settings as all_settings
from cbsa_torch.train.registry import TASKS, recipe_names
from tests.helpers.doc_pages import ROOT, error_messages
from tests.helpers.reference import ENTRIES, PAGES, VALUES, find

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


# ---- what an entry says


SHAPE = re.compile(r"``\(.*?\)``|\((?:height|B|N|images|rows)\b|square|number")
REFERRED = re.compile(
    r"\b(?:as (?:for|in|of|there|given)|see|of :\w+:|those of|what .* returned|inputs of the model)\b"
)
ALL_REFERRED = re.compile(r"(?:Arguments|Fields)\b[^.]*\bare those of")
SOURCE = re.compile(r"Eq\. \d|\(\d{1,2}\)|section \d|Appendix|Fig\. \d|arXiv|et al\.|, \d{4}\)|:func:|:class:")
MAY_BE_NONE = re.compile(r"[Dd]efault|None|if |perhaps|beside|needed|any ")
UNDERSTOOD = {"token_mask", "key_mask", "agent_mask", "representative_mask", "attn_mask"}
UNDERSTOOD |= {"cu_seqlens", "cu_representatives", "parallel", "grid_size", "coords"}
"""None of these is nothing given; docs/reference/api/index.md says so."""
NAMES = {"dim", "in_dim", "num_heads", "num_classes", "num_representatives", "num_landmarks", "device", "dtype"}
"""What needs no word in an entry, as it is always the same; that page says what."""


def described(doc, name):
    """What a docstring says of an argument: its lines under Args, or all of it if it has none for it."""
    match = re.search(rf"^ +(?:[\w*]+, )*\**{name}(?:, \w+)*: .*(?:\n {{8,}}.*)*", doc, re.MULTILINE)
    return match[0] if match else doc


def raises_itself(function):
    """Whether a function raises, or calls what checks its arguments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [getattr(call, "id", getattr(call, "attr", "")) for call in calls]
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree)) or any(
        n.startswith("check_") for n in names
    )


def faults(path, entry):
    """What the docstring of a function or class leaves out."""
    doc = inspect.cleandoc(entry.__doc__ or "")
    fields = getattr(entry, "_fields", None) or getattr(entry, "__dataclass_fields__", None)
    if fields is not None:
        texts = field_docs(entry)
        nested = {n for n, hint in typing.get_type_hints(entry).items() if dataclasses.is_dataclass(hint)}
        left = [n for n in fields if n not in {*texts, *nested} and not re.search(rf"\b{n}\b", doc)]
        return [] if ALL_REFERRED.search(doc) else [f"{path}.{n} is not explained" for n in left]
    if isinstance(entry, type) and issubclass(entry, (Exception, Protocol)):
        return []
    found = []
    parameters = {} if ALL_REFERRED.search(doc) else dict(inspect.signature(entry).parameters)
    for name, parameter in parameters.items():
        text, kind = described(doc, name), str(parameter.annotation)
        if name in NAMES or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if len(parameters) > 1 and not re.search(rf"\b{name}\b", doc):  # of one alone, all is said
            found.append(f"{path}: {name} is not explained")
        elif re.search(r"\bTensor\b|ndarray", kind) and not (SHAPE.search(text) or REFERRED.search(text)):
            found.append(f"{path}: no shape of {name}")
        elif (
            parameter.default is None
            and name not in UNDERSTOOD
            and not (MAY_BE_NONE.search(text) or REFERRED.search(text))
        ):
            found.append(f"{path}: what None stands for as {name}")
    if not isinstance(entry, type) and raises_itself(entry) and not re.search("[Rr]aises", doc):
        found.append(f"{path}: its errors")
    if path.startswith("cbsa_torch.ops.") and "counting" not in path and not SOURCE.search(doc):
        found.append(f"{path}: its equation or source")
    return found


CALLED = [path for path in ENTRIES if path not in VALUES and callable(find(path))]


@pytest.mark.parametrize("page", PAGES)
def test_arguments_shapes_defaults_errors_and_sources_are_told(page):
    told = [fault for path in PAGES[page] if path in CALLED for fault in faults(path, find(path))]
    assert told == []


def test_what_is_left_out_is_found():
    def scaled(tokens: torch.Tensor, factor: float | None = None, offset: float = 0.0) -> torch.Tensor:
        """Tokens times a factor.

        Args:
            tokens: what is scaled.
            factor: the scale.
        """
        if factor == 0:
            raise ValueError
        return tokens * factor + offset

    class Pair(NamedTuple):
        """The first one, and another."""

        first: int
        second: int

    found = [fault.removeprefix("cbsa_torch.ops.scaled: ") for fault in faults("cbsa_torch.ops.scaled", scaled)]
    assert found == [
        "no shape of tokens",
        "what None stands for as factor",
        "offset is not explained",
        "its errors",
        "its equation or source",
    ]
    assert faults("pair", Pair) == ["pair.second is not explained"]


# ---- pages that are made from the code, and what pages quote of it


def test_every_recipe_and_setting_is_there():
    made, known = settings(), set()
    for config, _ in TASKS.values():
        found = [*settings_of(config())]
        assert [setting.key for setting in found] == [key for key, *_ in all_settings(config())]
        assert [setting.key for setting in found if not setting.meaning or not setting.values] == []
        known |= {setting.key for setting in found}
    assert set(re.findall(r"^\| `([\w.]+)` \|", made, re.MULTILINE)) == known
    assert set(re.findall(r"^## (\w+) ", recipes(), re.MULTILINE)) == set(recipe_names())


def test_the_tests_that_hold_the_promises_exist():
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", (ROOT / "docs/reference/determinism.md").read_text())
    assert len(named) > 50
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


def parsed():
    """The files of the source, as trees."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def pattern(node, constants=()):
    """A text in the source as a pattern: what is filled in is anything, but for constants of the module."""
    if isinstance(node, ast.Constant):
        return re.escape(str(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name) and node.value.id in constants:
        return re.escape(constants[node.value.id])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return pattern(node.left, constants) + pattern(node.right, constants)
    return ".*"


def words(found):
    """What a pattern says whatever is filled in."""
    return re.sub(r"\\(.)", r"\1", found.replace(".*", " "))


def texts():
    """Every text in the source that may be a message, as a pattern."""
    for _, tree in parsed():
        for node in ast.walk(tree):
            text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if text or isinstance(node, (ast.JoinedStr, ast.BinOp)):
                found = pattern(node)
                if says_enough(found):
                    yield found


def says_enough(found):
    return len(re.findall(r"\w", words(found))) >= 12


def compiled(found):
    # something may stand before what is said of the last training state
    return re.compile(f"(?:[^;]*; )?{found}", re.DOTALL)


def test_every_message_of_the_index_is_in_the_source():
    patterns = [compiled(found) for found in set(texts())]
    quoted = error_messages()
    assert len(quoted) > 200
    assert [text for text in quoted if not any(found.fullmatch(text) for found in patterns)] == []


TELLING = re.compile(
    r"\b(must|needs?|needed|required|allowed|there are|is of|are of|beside|exclude|cannot have both|which one"
    r"|did you mean|is not a (folder|file)|add|append|ask|begin anew|build|call|choose|drop|fill|fuse|get it|give"
    r"|install|keep|leave|list|load|log in|lower|make|mend|move|name|offload|pass|put|raise|remove|rename|resize|resume|save"
    r"|set|subclass|trace|train|use|wait|write|cbsa \w+ (works?|knows))\b|--\w",
    re.IGNORECASE,
)
"""Words by which a message says what is allowed, or what to do."""
PART = re.compile("its? ")
"""How a text begins that another message gives as its reason."""


def raised():
    """Where each error is raised with words of its own, and their pattern."""
    for path, tree in parsed():
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        }
        for node in ast.walk(tree):
            made = isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
            if made and isinstance(node.exc.func, ast.Name) and node.exc.args:
                found = pattern(node.exc.args[0], constants)
                if says_enough(found):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", found


def test_messages_say_what_to_do_or_the_index_does():
    quoted = error_messages()
    silent = {}
    for place, found in raised():
        said = words(found)
        if (
            not TELLING.search(said)
            and not PART.match(said)
            and not any(map(compiled(found).fullmatch, quoted))
        ):
            silent[place] = said
    assert silent == {}
