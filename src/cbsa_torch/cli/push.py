"""``cbsa push``."""

from __future__ import annotations

from dataclasses import dataclass

from cbsa_torch.cli.options import parse
from cbsa_torch.train.engine.console import say
from cbsa_torch.train.hub import push_to_hub


@dataclass
class _PushArgs:
    """Upload model.safetensors, config.json and README.md of a trained model to the Hugging Face Hub.

    Log in first with `hf auth login`, or set HF_TOKEN. Nothing else is uploaded, and folders of this machine
    are left out of the description.
    """

    checkpoint: str
    """Run folder or .safetensors file."""
    repo_id: str
    """The repository, OWNER/NAME; made if there is none."""
    private: bool = False
    """Make a new repository private."""
    branch: str | None = None
    """What to push to. Default: main."""


def run(args: list[str]) -> None:
    """Upload a trained model to the Hugging Face Hub."""
    options = parse(_PushArgs, args, "push")
    address = push_to_hub(
        options.checkpoint, options.repo_id, private=options.private or None, branch=options.branch
    )
    say(f"pushed: {address}")
