"""What the site has beside docs: the command line, the recipes, the files beside README, the notebooks.

A hook of MkDocs, named in mkdocs.yml.
"""

from __future__ import annotations

import inspect
import io
import os
import re
import textwrap
from contextlib import redirect_stdout, suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import cbsa_torch
from cbsa_torch.cli import COMMANDS, data, main

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
                parts.append(f"```text\n{found.usage}\n```")
            parts.append(found.text.replace("<", "\\<"))
            if seen and len(new) < len(found.options):
                parts.append("Its other options are those above.")
            usage, seen = found.usage, seen | {(option.usage, option.meaning) for option in new}
            parts.append(_table(new))
        if command == "data":
            parts += ["### cbsa data check", inspect.cleandoc(data._CheckArgs.__doc__ or "")]
    return "\n\n".join(parts) + "\n"


def recipes() -> str:
    """The page of all recipes."""
    parts = ["# Recipes", "Settings that come with the package, for `cbsa train --config NAME`."]
    for path in sorted(RECIPES.glob("*.yaml")):
        parts += [f"## {path.stem}", f"```yaml\n{path.read_text(encoding='utf-8').strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def moved(name: str) -> str:
    """The text of a file beside README, as a page of ``docs/contribute``."""
    return re.sub(r"\]\(docs/", "](../", (ROOT / name).read_text(encoding="utf-8"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs calls this with the files that it found."""
    made = {
        "reference/command_line.md": command_line(),
        "reference/recipes.md": recipes(),
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


def _table(options: list[Option]) -> str:
    rows = ["| option | meaning | default |", "|---|---|---|"]
    section = ""
    for option in options:
        if option.section != section:
            section = option.section
            if section not in ("options", "positional arguments"):
                rows.append(f"| **{section}** | | |")
        found = DEFAULT.search(option.meaning)
        default = f"`{found[1]}`" if found and found[1] else ""
        meaning = SPECIAL.sub(lambda m: m[0] if m[1] else f"\\{m[0]}", DEFAULT.sub("", option.meaning))
        usage = f"`{option.usage.replace('{None}|', '')}`"
        rows.append(f"| {usage} | {meaning} | {default} |")
    return "\n".join(rows)
