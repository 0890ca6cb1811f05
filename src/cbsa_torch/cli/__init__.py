"""The command ``cbsa``. ``cbsa NAME`` is the function ``run`` of the module of that name beside this one."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Sequence

from cbsa_torch._core.checks import nearest
from cbsa_torch._core.optional import require
from cbsa_torch._core.text import readable
from cbsa_torch._version import __version__

COMMANDS = {
    "train": "Train a classifier or a segmenter (default: the embedded digits).",
    "adapt": "Give a pretrained ViT linear attention, and recover its accuracy.",
    "eval": "Evaluate a trained model.",
    "predict": "Classify or segment image files.",
    "report": "Write a page about a trained model: accuracy, curves, coding rates, attention maps.",
    "compare": "Show several trained models side by side on one page.",
    "count": "Count parameters, FLOPs and pairwise similarities of models.",
    "bench": "Time layers or models beside their baselines.",
    "convert": "Convert a released checkpoint of the official code.",
    "export": "Write a trained model as a program: ONNX or torch.export, of one size or of any.",
    "push": "Upload a trained model to the Hugging Face Hub.",
    "data": "Fetch a data set (animals28, emoji64), write one as files (digits), or check one of yours.",
    "list": "List our models and recipes.",
}
"""Commands and what they do; their modules are imported when they are called."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it."""
SAVED = 75
"""Exit code of a run that a signal stopped after saving its state: a temporary failure (EX_TEMPFAIL)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = [*(sys.argv[1:] if argv is None else argv)]  # list() is hidden by the module of that command
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        print(f"cbsa: no command {args[0]!r}{nearest(args[0], COMMANDS)}\n\n{_usage()}", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):  # a name must not end a command because the terminal lacks a letter
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        require("train")
        from cbsa_torch.train.engine.accelerate import leave_process_group
        from cbsa_torch.train.errors import EXPECTED_ERRORS, InterruptedRun

        command = importlib.import_module(f"cbsa_torch.cli.{args[0]}")
    except ImportError as error:
        _complain(error)
        return 1
    try:
        command.run(args[1:])
    except InterruptedRun as error:
        _complain(error)
        leave_process_group()
        return SAVED
    except KeyboardInterrupt:
        print("cbsa: interrupted", file=sys.stderr)
        return INTERRUPTED
    except EXPECTED_ERRORS as error:
        _complain(error)
        return 1
    leave_process_group()
    return 0


def _complain(error: BaseException) -> None:
    print(f"cbsa: {readable(error, lines=True)}", file=sys.stderr)


def _usage() -> str:
    lines = ["usage: cbsa COMMAND [options]     (cbsa COMMAND --help lists them)", ""]
    return "\n".join([*lines, *(f"  {name:<9}{summary}" for name, summary in COMMANDS.items())])
