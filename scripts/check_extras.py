"""Install the built wheel with each extra into a fresh environment, and run there what the extra promises.

    python scripts/check_extras.py [base] [models] [streaming] [interpret] [train] [slides] [export] [all]

Without arguments every environment is checked. torch and its requirements are linked into the environments from
the interpreter that runs this script (they take gigabytes); pip installs everything else.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ("base", "models", "streaming", "interpret", "train", "slides", "export", "all")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def main(names: list[str]) -> int:
    """Check the environments; returns the exit code."""
    if unknown := set(names) - set(ENVIRONMENTS):
        print(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(ENVIRONMENTS)}", file=sys.stderr)
        return 2
    failed = []
    with tempfile.TemporaryDirectory(prefix="cbsa_extras_") as temporary:
        folder = Path(temporary)
        _, wheel = build(folder / "dist")
        print(f"built {wheel.name}")
        linked = link_torch(folder / "torch")
        print(f"shared by all environments: torch and {linked - 1} distributions that it requires")
        for name in names or ENVIRONMENTS:
            begin = time.monotonic()
            print(f"{name}: installing", flush=True)
            python = make_environment(folder / name, wheel, name, folder / "torch")
            if call([python, ROOT / "scripts" / "extra_promises.py", name], folder):
                failed.append(name)
            outcome = "FAILED" if name in failed else "ok"
            print(f"{name}: {outcome} ({time.monotonic() - begin:.0f} s)", flush=True)
            shutil.rmtree(folder / name)
    return 1 if failed else 0


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and from it the wheel, into a folder that is emptied first; returns both."""
    shutil.rmtree(folder, ignore_errors=True)
    if call([sys.executable, "-m", "build", "--quiet", "--outdir", folder, ROOT], ROOT):
        raise SystemExit("the sdist or the wheel could not be built")
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def requirements(name: str, extras: frozenset[str] = frozenset()) -> dict[str, importlib.metadata.Distribution]:
    """A distribution that is installed here and all that it requires on this platform, by name."""
    found = {name: importlib.metadata.distribution(name)}
    for text in found[name].requires or ():
        needed = Requirement(text)
        applies = needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *extras))
        if applies:
            found |= requirements(needed.name, frozenset(needed.extras))
    return found


def link_torch(folder: Path) -> int:
    """Link the packages of torch and of its requirements into a folder; returns how many distributions."""
    folder.mkdir()
    distributions = requirements("torch").values()
    for distribution in distributions:
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():  # several distributions share the folder nvidia
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return len(distributions)


def make_environment(folder: Path, wheel: Path, name: str, torch_folder: Path) -> Path:
    """Create a virtual environment with the wheel and one extra; returns its interpreter."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "torch.pth").write_text(f"{torch_folder}\n")
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={importlib.metadata.version('torch')}\n")
    target = str(wheel) if name == "base" else f"{wheel}[{name}]"
    install: list[str | Path] = [
        *PIP,
        "--python",
        python,
        "install",
        "--quiet",
        "--constraint",
        constraints,
        target,
    ]
    if call(install, folder):
        raise SystemExit(f"{target} could not be installed")
    return python


def call(command: Sequence[str | Path], folder: Path) -> int:
    """Run a command in ``folder``, without what this environment would add to its imports."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
