"""Build sdist and wheel into dist/, check them, and try them in fresh environments.

    python scripts/release_check.py [--tag v1.2.3] [oldest[=PYTHON]] [newest[=PYTHON]]

The wheel is built from the sdist. Metadata, contents and, with ``--tag``, version and changelog are checked.
Each environment gets the wheel with the extra ``all``: ``oldest`` with every requirement at its lower bound in
pyproject.toml, ``newest`` with what pip takes by itself. PYTHON is its interpreter, by default this one. What
is tried there is in :func:`try_out`. One environment exists at a time: it takes about 7 GB.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from check_extras import PIP, ROOT, build, call
from packaging.metadata import Metadata

from cbsa_torch import __version__

ENVIRONMENTS = ("oldest", "newest")
TESTS = ("tests/_core", "tests/ops", "tests/nn", "tests/models/test_models.py", "tests/models/test_timm.py")
"""Of the sdist, run on the installed wheel; they need no other packages than these."""
FOR_TESTS = ("pytest", "hypothesis")
WITH_PACKAGES_OF_DEV = ("tests/_core/test_linear.py", "tests/nn/test_adapters.py")
"""Of :data:`TESTS`, those that need more: peft, torchao."""
NOT_ON_OLDEST = (
    "tests/ops/cbsa/triton",  # Triton's interpreter converts arrays in a way that NumPy warns of
    "tests/nn/test_cbsa.py::test_every_implementation_is_the_same_layer",  # likewise
    "tests/nn/test_grids.py::test_exported_models",  # PyTorch: "exactly one guard export"
    "tests/nn/test_reading.py::test_compiled_in_one_graph",  # PyTorch cannot tell the type of a field
    "tests/nn/test_representatives.py::test_a_fixed_grid_of_representatives_in_every_layer",  # another error
    "tests/nn/test_mixer.py::test_options_for_what_takes_a_class",  # looks at a model as timm 1.0.31 has it
    "tests/models/test_timm.py::test_saved_by_timm_after_changes_and_loaded_for_other_images",  # timm 1.0.31
)
"""What the oldest packages cannot do, with the reason; docs/contribute/releasing.md tells users."""


def main(argv: list[str]) -> int:
    """Build, check, and try the environments; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", metavar="oldest[=PYTHON]|newest[=PYTHON]")
    parser.add_argument("--tag", help="of this release: v and the version")
    args = parser.parse_args(argv)
    wanted = {name: python for name, _, python in (e.partition("=") for e in args.environments)}
    if unknown := wanted.keys() - set(ENVIRONMENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(ENVIRONMENTS)}")
    if args.tag is not None:
        check_tag(args.tag)
    sdist, wheel = build(ROOT / "dist")
    run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], ROOT)
    check_contents(sdist, wheel)
    for name, python in wanted.items():
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"cbsa_{name}_") as temporary:
            try_out(name, python or sys.executable, sdist, wheel, Path(temporary))
        print(f"{name}: ok ({time.monotonic() - begin:.0f} s)", flush=True)
    return 0


def check_tag(tag: str) -> None:
    """The tag must name the version, and the changelog must have it, dated."""
    if tag != f"v{__version__}":
        raise SystemExit(f"the tag of version {__version__} is v{__version__}, not {tag}")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        raise SystemExit(f"CHANGELOG.md has no heading '## [{__version__}] - YYYY-MM-DD'")


def check_contents(sdist: Path, wheel: Path) -> None:
    """The wheel must hold the package and its licence, the sdist what git tracks; nothing else."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.splitlines() if not name.startswith(".")}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    info = f"cbsa_torch-{__version__}.dist-info"
    own = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt", "entry_points.txt")}
    own.add(f"{info}/licenses/LICENSE")
    package = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    compare(wheel, in_wheel, package | own)
    with tarfile.open(sdist) as archive:
        in_sdist = {str(PurePosixPath(*PurePosixPath(m.name).parts[1:])) for m in archive if m.isfile()}
    made = {name for name in in_sdist if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    compare(sdist, in_sdist - made, tracked)


def compare(archive: Path, found: set[str], expected: set[str]) -> None:
    """Stop if an archive holds other files than it should."""
    if found != expected:
        missing, surplus = sorted(expected - found), sorted(found - expected)
        raise SystemExit(f"{archive.name} lacks {missing} and has {surplus} too much")
    print(f"{archive.name}: {archive.stat().st_size / 1e6:.2f} MB, {len(found)} files", flush=True)


def try_out(name: str, interpreter: str, sdist: Path, wheel: Path, folder: Path) -> None:
    """Install the wheel; try what the extras promise, its types, its import and tests of the sdist."""
    run([interpreter, "-m", "venv", "--without-pip", "environment"], folder)
    python = folder / "environment" / "bin" / "python"
    pins = folder / "constraints.txt"
    pins.write_text("".join(f"{pin}\n" for pin in lower_bounds(wheel)) if name == "oldest" else "")
    install: list[str | Path] = [*PIP, "--python", python, "install", "--quiet", "--constraint", pins]
    run([*install, f"{wheel}[all]", *FOR_TESTS], folder)
    print(f"{name}: {versions(python)}", flush=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    scripts = unpacked / "scripts"
    run([python, scripts / "import_time.py"], folder)
    run([python, scripts / "extra_promises.py", "all"], folder)
    mypy: list[str | Path] = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--cache-dir",
        folder / "mypy",
    ]
    run([*mypy, "--python-executable", python, scripts / "typed_user.py"], folder)
    run([python, scripts / "typed_user.py"], folder)
    left_out = [f"--ignore={path}" for path in WITH_PACKAGES_OF_DEV]
    if name == "oldest":
        left_out += [f"--deselect={test}" for test in NOT_ON_OLDEST]
    run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *left_out, *TESTS], unpacked)


def lower_bounds(wheel: Path) -> list[str]:
    """The requirements of a wheel and of all its extras, at the oldest version that each admits."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = Metadata.from_email(archive.read(f"cbsa_torch-{__version__}.dist-info/METADATA"))
    return sorted(
        f"{requirement.name}=={bound.version}"
        for requirement in metadata.requires_dist or ()
        for bound in requirement.specifier
        if bound.operator == ">="
    )


def versions(python: Path) -> str:
    """What an environment has, for the record."""
    names = ("torch", "timm", "numpy", "torchvision", "accelerate", "onnx", "matplotlib")
    code = (
        "import platform; from importlib.metadata import version; "
        f"print('Python', platform.python_version(), *(f'{{n}} {{version(n)}}' for n in {names}), sep=', ')"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def run(command: Sequence[str | Path], folder: Path) -> None:
    """Run a command that must succeed."""
    if code := call(command, folder):
        raise SystemExit(f"exit code {code} of {' '.join(map(str, command))}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
