"""What the site has beside docs: command line, recipes, settings, the files beside README, the notebooks.

A hook of MkDocs, named in mkdocs.yml.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import os
import re
import textwrap
import typing
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import cbsa_torch
from cbsa_torch.cli import COMMANDS, data, main
from cbsa_torch.train.registry import TASKS, load_config

ROOT = Path(__file__).parents[1]
RECIPES = Path(cbsa_torch.__file__).parent / "train/recipes"
VARIANTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "train": ((), ("--config", "emoji_scenes"), ("--config", "slides")),
    "bench": (("layers",), ("models",)),
    "data": (("fetch",), ("images",)),
}
"""Commands whose options depend on what they are told first."""
RULE = re.compile(r" -{5,}")
DEFAULT = re.compile(r" ?\((?:default: )?(required|(?<=: )[^()]*)\)$")
SPECIAL = re.compile(r"(`+)[^`]*\1|[|*_<>\\]")  # outside code, to Markdown
TOGETHER = re.compile(
    r"<pre.*?</pre>|<code>.*?</code>|class=\"arithmatex\">.*?</|(?<=\d) %|(?<=\d) [±\u00d7x/] (?=\d)", re.DOTALL
)
"""What stays on one line, beside what is not touched."""
WORDS = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", dict: "names and values"}
"""Types of settings, in words."""
OPTION = re.compile(r" {2}([-\[]\S.*?|[A-Z]+)(?: {2,}(.*))?")


class Option(NamedTuple):
    """An option of a command, as its help has it."""

    section: str
    usage: str
    meaning: str

    @property
    def names(self) -> list[str]:
        """``["--flip", "--no-flip"]``; none for an argument without a name."""
        return re.findall(r"(?<!\S)--?[a-z][\w.-]*", self.usage)


class Help(NamedTuple):
    """What ``cbsa COMMAND --help`` says."""

    usage: str
    """Of a command that explains its usage itself."""
    text: str
    options: list[Option]


def read_help(*args: str) -> Help:
    """The help of a command; ``args`` are its name and what decides on its options."""
    out = io.StringIO()
    with patch.dict(os.environ, COLUMNS="110"), redirect_stdout(out), suppress(SystemExit):
        main([*args, "--help"])  # wider, tyro makes two columns
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()]
    first = next((i for i, line in enumerate(lines) if RULE.fullmatch(line)), len(lines) + 1) - 1
    head = "\n".join(line for line in lines[:first] if "[-h]" not in line)
    usage, _, text = head.rpartition("\n\n\n") if head.startswith("usage:") else ("", "", head)
    options: list[Option] = []
    section = ""
    for line, after in pairwise([*lines[first:], ""]):
        if re.fullmatch(r" *-{5,}", line):
            continue
        if RULE.fullmatch(after):
            section = line.strip()
        elif match := OPTION.fullmatch(line):
            options.append(Option(section, match[1], match[2] or ""))
        elif line.startswith("   ") and options:
            options[-1] = options[-1]._replace(meaning=f"{options[-1].meaning} {line.strip()}".strip())
    options = [option for option in options if "--help" not in option.names]
    first_line, _, rest = text.strip().partition("\n")  # tyro leaves the indentation of a docstring
    return Help(usage.strip(), f"{first_line}\n{textwrap.dedent(rest)}".strip(), options)


def command_line() -> str:
    """The page of all commands and their options."""
    parts = ["# Command line", "Made from the parsers of the commands: `cbsa COMMAND --help` says the same."]
    for command, summary in COMMANDS.items():
        variants = VARIANTS.get(command, ((),))
        parts += [f"## cbsa {command}"] if () in variants else [f"## cbsa {command}", summary]
        usage, seen = "", set[tuple[str, str]]()
        for args in variants:
            found = read_help(command, *args)
            new = [option for option in found.options if (option.usage, option.meaning) not in seen]
            if args:
                parts.append(f"### cbsa {command} {' '.join(args)}")
            if found.usage != usage:
                parts.append(f"``` {{.text .message}}\n{found.usage}\n```")
            parts.append(found.text.replace("<", "\\<"))
            if seen and len(new) < len(found.options):
                parts.append("Its other options are those above.")
            usage, seen = found.usage, seen | {(option.usage, option.meaning) for option in new}
            parts.append(_table(new))
        if command == "data":
            parts += ["### cbsa data check", inspect.cleandoc(data._CheckArgs.__doc__ or "")]
    return "\n\n".join(parts) + "\n"


def recipes() -> str:
    """The page of all recipes: what each says of itself at its top, and its settings."""
    rows, parts = ["| recipe | task | model | data |", "|---|---|---|---|"], []
    for path in sorted(RECIPES.glob("*.yaml")):
        text = path.read_text(encoding="utf-8").strip()
        head = re.match(r"(?:#.*\n)*", text)[0]  # type: ignore[index]  # matches nothing, too
        says = SPECIAL.sub(_escaped, re.sub(r"^# ?", "", head, flags=re.MULTILINE).strip())
        config = load_config(path.stem)
        model = config.model.args.get("encoder", getattr(config.model, "original", None) or config.model.name)
        link = f"[{path.stem}](#{path.stem})"
        rows.append(f"| {link} | {config.task} | `{model}` | `{config.data.name}` |")
        parts += [f"## {path.stem} {{ #{path.stem} }}", says, f"```yaml\n{text[len(head) :].strip()}\n```"]
    intro = (
        "Settings that come with the package, for `cbsa train --config NAME`. "
        "What a recipe leaves out has its [default](settings.md)."
    )
    return "\n\n".join(["# Recipes", intro, "\n".join(rows), *parts]) + "\n"


class Setting(NamedTuple):
    """A setting of a run."""

    key: str
    """As ``optim.lr``."""
    values: str
    """What it may be."""
    default: str
    meaning: str


def settings_of(config: Any, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a configuration, with the docstring of its field."""
    hints, documented = typing.get_type_hints(type(config)), field_docs(type(config))
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{prefix}{item.name}.")
            continue
        meaning = documented[item.name]
        if item.metadata.get("compared", True) is False:
            meaning += " A continued run may change it."
        default = "" if value is None or value in ({}, ()) else _shown(value)
        yield Setting(f"{prefix}{item.name}", _values(hints[item.name]), default, meaning)


def settings() -> str:
    """The page of all settings, by task; what several tasks have is said once."""
    parts = [
        "# Settings",
        "Every setting of a run and its default; [recipes](recipes.md) set others. `optim.lr` is "
        "`--optim.lr 1e-3` on the [command line](command_line.md), `OptimConfig(lr=1e-3)` in "
        "[Python](api/training.md#settings), and in a YAML file\n\n```yaml\noptim:\n  lr: 1.0e-3\n```",
        "Each meaning begins with the kind of value and the default; where none is named, the text says "
        "what happens.",
    ]
    known: set[Setting] = set()
    for task, (config, _) in TASKS.items():
        summary = (inspect.getdoc(config) or "").partition("\n")[0]
        defaults = config()  # type: ignore[call-arg]  # of a task, whose data have defaults
        found = [setting for setting in settings_of(defaults) if setting not in known]
        parts += [f"## {task.capitalize()}", summary]
        parts += ["The other settings are those of classification."] if known else []
        for group in dict.fromkeys(setting.key.rpartition(".")[0] for setting in found):
            own = [setting for setting in found if setting.key.rpartition(".")[0] == group]
            rows = ["| setting | meaning |", "|---|---|"]
            rows += [f"| `{s.key}` | {_kind(s)} {_cell(s.meaning)} |" for s in own]
            parts += [f"### {group or 'run'} {{ #{task}-{group or 'run'} }}", "\n".join(rows)]
        known |= set(found)
    return "\n\n".join(parts) + "\n"


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The docstrings below the fields of a dataclass or a NamedTuple, those of its bases included."""
    documented: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base) or hasattr(base, "_fields"):
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
            for node, after in pairwise(body):
                if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
                    documented[node.target.id] = " ".join(after.value.value.split())  # type: ignore
    return documented


def _values(hint: Any) -> str:
    """What a type allows, in words."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is tuple:
        return f"{WORDS[parts[0]]}s, {'any' if parts[-1] is ... else len(parts)}"
    if type(None) in typing.get_args(hint):
        return " or ".join(map(_values, parts))
    return WORDS.get(typing.get_origin(hint) or hint, "text")


def _kind(setting: Setting) -> str:
    """What a value may be, and the default."""
    return f"*{setting.values}" + (f"; default* {setting.default}." if setting.default else ".*")


def _shown(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return f"`{text}`" if text else ""


def _escaped(match: re.Match[str]) -> str:
    """What :data:`SPECIAL` finds, so that Markdown shows it."""
    return match[0] if match[1] else f"\\{match[0]}"


def _cell(text: str) -> str:
    """Plain text in a cell of a table."""
    return SPECIAL.sub(_escaped, text)


def moved(name: str) -> str:
    """The text of a file beside README, as a page of ``docs/contribute``."""
    return re.sub(r"\]\(docs/", "](../", (ROOT / name).read_text(encoding="utf-8"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs calls this with the files that it found."""
    made = {
        "reference/command_line.md": command_line(),
        "reference/recipes.md": recipes(),
        "reference/settings.md": settings(),
        "contribute/index.md": moved("CONTRIBUTING.md"),
        "contribute/changes.md": moved("CHANGELOG.md"),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.name}", abs_src_path=str(notebook)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """MkDocs calls this with every page: the folder of the notebooks is beside docs, and in the site within."""
    return markdown.replace("](../../notebooks/", "](../notebooks/")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """MkDocs calls this with every page as HTML.

    Long names of tests may be broken; %, ± and the like stay with their numbers.
    """
    html = TOGETHER.sub(lambda found: found[0].replace(" ", "&nbsp;") if found[0][0] == " " else found[0], html)
    return re.sub(r"\b[\w/]+\.py::\w+", lambda name: re.sub(r"([/_]|::)", r"\1<wbr>", name[0]), html)


def _table(options: list[Option]) -> str:
    rows = ["| option | meaning |", "|---|---|"]
    section = ""
    for option in options:
        if option.section != section:
            section = option.section
            if section not in ("options", "positional arguments"):
                rows.append(f"| **{section}** | |")
        found = DEFAULT.search(option.meaning)
        value = found[1] if found else "None"  # then the text says what happens
        default = {"None": "", "": "", "required": " *Required.*"}.get(value, f" *Default* `{value}`.")
        usage = f"`{option.usage.replace('{None}|', '')}`"
        rows.append(f"| {usage} | {_cell(DEFAULT.sub('', option.meaning))}{default} |")
    return "\n".join(rows)
