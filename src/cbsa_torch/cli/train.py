"""``cbsa train``."""

from __future__ import annotations

from cbsa_torch.cli.options import parse, resumed, take_option
from cbsa_torch.train.config import RunConfig
from cbsa_torch.train.registry import load_config
from cbsa_torch.train.tasks.segmentation.task import PRETRAINED
from cbsa_torch.train.trainer import train

USAGE = """usage: cbsa train [--config RECIPE_OR_YAML] [--model NAME] [options]

  --config  a recipe (`cbsa list`) or YAML file: the defaults that are shown below. Default: digits
  --model   short for --model.name

Later options win.
"""


def run(args: list[str]) -> None:
    """Train a classifier or a segmenter, as the configuration says (default: the embedded digits)."""
    if {"-h", "--help"} & set(args):
        print(USAGE)
    train(read_options(args, "train", "digits"))


def read_options(args: list[str], command: str, recipe: str) -> RunConfig:
    """The configuration that the options of a command say.

    Args:
        args: the options.
        command: its name, for the help.
        recipe: the defaults, where no option says another.
    """
    source, rest = take_option("--config", args)
    model, rest = take_option("--model", rest)
    if model is not None:
        rest = ["--model.name", model, *rest]
    if source is None:
        source = resumed(rest, load_config(recipe).output) or recipe
    default = load_config(source)
    encoder_from = take_option("--model.encoder-from", [arg.replace("_", "-") for arg in rest])[0]
    if encoder_from not in (None, PRETRAINED):  # it says which encoder: what the recipe says of one gives way
        for key in ("encoder", "encoder_args"):
            default.model.args.pop(key, None)
    config: RunConfig = parse(type(default), rest, command, default)
    return config
