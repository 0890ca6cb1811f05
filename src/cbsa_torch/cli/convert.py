"""``cbsa convert``."""

from __future__ import annotations

from dataclasses import dataclass

from cbsa_torch.cli.options import at_least, parse
from cbsa_torch.models.convert import convert_official
from cbsa_torch.train.engine.console import say


@dataclass
class _ConvertArgs:
    """Convert a released checkpoint (CBT, CRATE, ToST, hybrids) into one of ours."""

    official: str
    """A .pth, .pth.tar or .safetensors file."""
    output: str
    """The .safetensors file to write."""
    num_heads: int | None = None
    """Heads of a CRATE of a width that was not published."""


def run(args: list[str]) -> None:
    """Convert a released checkpoint of the official code."""
    options = parse(_ConvertArgs, args, "convert")
    at_least(1, num_heads=options.num_heads)
    info = convert_official(options.official, options.output, num_heads=options.num_heads)
    say(f"{options.output}: {info['model']} {info['model_args']}")
