"""The pages of the model families: below the text of each comes what code and records say of it.

A hook of MkDocs, named in mkdocs.yml. The texts are ``docs/reference/families/NAME.md``.
"""

from __future__ import annotations

import functools
import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from cbsa_torch.cli.count import count_named
from cbsa_torch.models.registry import FAMILIES, Family, mixer_options, model_name, sizes_of
from cbsa_torch.models.shipped import SHIPPED
from cbsa_torch.models.token_set_registry import token_set_names
from cbsa_torch.nn import TokenMixer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGES = "reference/families/"
IN_DIM, TOKENS = 1536, 256
"""What models of sets are counted for."""
VIT = "vit_small_patch16_224"
"""The black-box model of timm that the others are timed beside."""
COUNTS = ["parameters", "GFLOPs", "fused", "similarities"]

SIZES = """## Sizes

For one image, as `cbsa count NAME` counts. FLOPs are those of matrix products, two per multiply-add: of the
layers as published, and of the model [fused for inference](../layers.md#models-fused-for-inference).
Similarities are the inner products that decide who attends to whom.

"""
SIZES_OF_SETS = f"""## Sizes

For a set of {TOKENS:,} features of width {IN_DIM:,}, as
`cbsa count NAME --tokens {TOKENS} --args in_dim {IN_DIM}` counts.

"""
WEIGHTS = """## Weights that come with the package

By `timm.create_model(NAME, pretrained=True)`, and as `--checkpoint NAME` of the commands.

"""
OPTIONS = """## Options

Arguments of the models, beside those of every
[`WhiteBoxTransformer`](../api/models.md#cbsa_torch.models.WhiteBoxTransformer). [The layers](../api/layers.md)
say what they mean. Where there are representatives, the sizes `pico` and `nano` have 16.

"""
ON_DIGITS = """## On digits

Test accuracy on scikit-learn's digits in per cent, mean and standard deviation over {seeds} seeds, and
milliseconds of a training step of 64 images. One of the 360 test images is 0.28 %, so differences of half a per
cent mean nothing. `python benchmarks/digits_family.py` made the record;
[all members](../../results/small_models.md#on-digits).

"""
ON_CPU = """Images per second. Two CPU threads, float32, torch {torch}, {date:.10} (`cbsa bench models`,
`benchmarks/results/models.json`); a training step is forward and backward.

"""
ON_GPU = """{device}, bfloat16 autocast, torch {torch}, {date}, inference / training step (`python
benchmarks/gpu_check.py`, `benchmarks/results/gpu_h200.json`).

"""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """MkDocs calls this with the text of every page."""
    path = page.file.src_uri
    if not path.startswith(PAGES):
        return markdown
    name = path.removeprefix(PAGES).removesuffix(".md")
    return f"{markdown}\n{generated(name)}\n"


def generated(page: str) -> str:
    """What is put below the text of a page: of a family, of ``token_set``, or of the ``index``."""
    if page == "index":
        return overview()
    if page == "token_set":
        return sizes_of_sets()
    family = FAMILIES[page]
    parts = [
        sizes(page),
        weights(page),
        options(family),
        speed(page),
        accuracy_on_digits(page),
        citation(family.paper),
    ]
    return "\n\n".join(part for part in parts if part)


def overview() -> str:
    """All families, by their smallest model of 224 x 224 pixels."""
    rows = []
    for name, family in FAMILIES.items():
        link = f"[{_short(references()[family.paper])}](https://arxiv.org/abs/{family.paper})"
        rows.append([f"[`{name}`]({name}.md)", family.summary, link, *counted(model_name(name, "tiny"))])
    return table(["family", "layers", "paper", *COUNTS], rows)


def sizes(family: str) -> str:
    """Every registered model of a family, counted."""
    rows = []
    for size, spec in sizes_of(family).items():
        name = model_name(family, size)
        shape = ", ".join(str(spec.args[key]) for key in ("embed_dim", "depth", "num_heads"))
        rows.append([f"`{name}`", " x ".join(map(str, spec.input_size)), shape, *counted(name)])
    return SIZES + table(["model", "image", "width, depth, heads", *COUNTS], rows)


def sizes_of_sets() -> str:
    """Every registered model of sets of features, counted."""
    rows = [[f"`{name}`", *counted(name)] for name in token_set_names()]
    return SIZES_OF_SETS + table(["model", *COUNTS], rows)


def weights(family: str) -> str:
    """The weights of the package, if there are some of this family."""
    names = {model_name(family, size) for size in sizes_of(family)}
    rows = []
    for shipped in SHIPPED.values():
        if shipped.architecture in names:
            record = json.loads((shipped.folder / "eval_test.json").read_text())
            accuracy = f"{100 * record['top1']:.2f} % of {record['images']}"
            rows.append([f"`{shipped.name}`", shipped.description, said(shipped.form), accuracy])
    return WEIGHTS + table(["name", "what", "arguments", "right on test images"], rows) if rows else ""


def options(family: Family) -> str:
    """The arguments of a family's models that are options of its mixers, and their defaults."""
    rows: dict[str, list[str]] = {}
    for mixer in [m for m in (family.first, family.mixer) if m is not None]:
        known = {**inspect.signature(TokenMixer).parameters, **inspect.signature(mixer).parameters}
        for name in sorted(mixer_options(mixer)):
            default = family.defaults.get(name, known[name].default)
            rows.setdefault(name, [f"`{name}`", f"`{default!r}`", f"`{mixer.__name__}`"])
    return OPTIONS + table(["option", "default", "of the layer"], rows.values())


def speed(family: str) -> str:
    """Images per second beside timm's ViT-S, from the records."""
    name = model_name(family, "small")
    record = json.loads((RESULTS / "models.json").read_text())
    on_gpu = json.loads((RESULTS / "gpu_h200.json").read_text())
    timed = [row for row in record["rows"] if row["name"] in (name, f"{name} fused", VIT)]
    if all(row["name"] == VIT for row in timed):
        return "## Speed\n\nThis family has not been timed."
    cells = {
        (f"{_batch(row)}{', training' if row['training'] else ''}", f"`{row['name']}`"): (
            f"{row['images_per_second']:.3g}"
        )
        for row in timed
    }
    gpu_cells = {
        (_batch(row), f"`{row['name']}`"): (
            f"{row['forward_images_per_second']:,.0f} / {row['training_images_per_second']:,.0f}"
        )
        for row in on_gpu
        if row["kind"] == "model" and row["name"] in (name, VIT) and row["impl"] in (None, "auto")
    }
    versions = next(row for row in on_gpu if row["kind"] == "versions")
    return (
        f"## Speed\n\n{ON_CPU.format(**record['environment'])}{crossed(cells)}\n\n"
        f"{ON_GPU.format(**versions)}{crossed(gpu_cells)}"
    )


def accuracy_on_digits(family: str) -> str:
    """Accuracy on the digits, from the record; nothing if the family is not in it."""
    record = json.loads((RESULTS / "digits_family.json").read_text())
    name = model_name(family, "pico") if "pico" in sizes_of(family) else None
    rows = [
        [
            f"`{name}`",
            said(row["model_args"]),
            f"{100 * row['mean']:.1f} ± {100 * row['sd']:.1f}",
            f"{row['parameters']:,}",
            f"{row['step_ms']:.0f}",
        ]
        for row in record["rows"]
        if row["model"] == name
    ]
    head = ["model", "options", "accuracy", "parameters", "step"]
    return ON_DIGITS.format(seeds=len(record["seeds"])) + table(head, rows) if rows else ""


def citation(paper: str) -> str:
    """The BibTeX entry of the paper behind a family, from CITATION.cff."""
    entry = references()[paper]
    authors = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in entry["authors"])
    key = f"{_ascii(entry['authors'][0]['family-names'])}{entry['year']}"
    lines = [
        f"@inproceedings{{{key},",
        f"  title     = {{{_in_lines(entry['title'])}}},",
        f"  author    = {{{_in_lines(authors)}}},",
        f"  booktitle = {{{entry['conference']['name']}}},",
        f"  year      = {{{entry['year']}}},",
        f"  note      = {{arXiv:{paper}}}",
        "}",
    ]
    return "## Citation\n\n```bibtex\n" + "\n".join(lines) + "\n```"


@functools.cache
def counted(name: str) -> list[str]:
    """Parameters, GFLOPs as published and fused, similarities."""
    args = {"in_dim": IN_DIM} if name in token_set_names() else {}
    counts, fused, _ = count_named(name, args, (), TOKENS)
    total = counts.total
    return [
        f"{total.parameters:,}",
        f"{total.counts.flops / 1e9:.3g}",
        f"{fused.total.counts.flops / 1e9:.3g}",
        f"{total.counts.similarities:,}",
    ]


@functools.cache
def references() -> dict[str, dict[str, Any]]:
    """The papers of CITATION.cff by their arXiv numbers."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    entries = [cff["preferred-citation"], *cff["references"]]
    return {item["value"].removeprefix("arXiv:"): entry for entry in entries for item in entry["identifiers"]}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def crossed(cells: dict[tuple[str, str], str]) -> str:
    """A table of values by row and column."""
    rows, columns = (list(dict.fromkeys(key[axis] for key in cells)) for axis in (0, 1))
    return table(["", *columns], ([row, *(cells.get((row, column), "") for column in columns)] for row in rows))


def said(arguments: Mapping[str, Any]) -> str:
    """Arguments as they are written in Python."""
    return ", ".join(f"`{name}={value!r}`" for name, value in arguments.items())


def _batch(row: dict[str, Any]) -> str:
    return f"{row['batch']} x {row['image_size']}²"


def _short(entry: dict[str, Any]) -> str:
    return f"{entry['authors'][0]['family-names']} et al., {entry['year']}"


def _in_lines(text: str) -> str:
    """The value of a field of BibTeX."""
    return textwrap.fill(text, 72).replace("\n", f"\n{' ' * 15}")


def _ascii(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isascii() and letter.isalpha())
