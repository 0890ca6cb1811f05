"""``cbsa list``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

from cbsa_torch.cli.options import parse
from cbsa_torch.models import registry
from cbsa_torch.models.shipped import SHIPPED
from cbsa_torch.models.token_set_registry import token_set_names
from cbsa_torch.train.registry import recipe_names


@dataclass
class _ListArgs:
    """List models and recipes."""

    kind: list[Literal["models", "recipes"]] = field(default_factory=lambda: ["models", "recipes"])
    """What to list."""


def run(args: list[str]) -> None:
    """List our models and recipes."""
    kinds = parse(_ListArgs, args, "list").kind
    if "models" in kinds:
        for family, names in itertools.groupby(
            {**registry.names(), **token_set_names()}.items(), key=lambda item: item[1]
        ):
            print(f"{family}\n  " + "\n  ".join(name for name, _ in names))
        print("weights that come with the package")
        for weights in SHIPPED.values():
            print(f"  {weights.name}: {weights.description}")
    if "recipes" in kinds:
        print("recipes: " + ", ".join(recipe_names()))
