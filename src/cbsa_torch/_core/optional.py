"""Optional dependencies: imported where used, with an error that says what to install."""

from __future__ import annotations

import importlib.util


def require(module: str, extra: str) -> None:
    """Raise ``ImportError`` with the pip command if ``module`` (of the extra ``extra``) is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(
            f"this part of cbsa_torch needs {module!r}, which is not installed; "
            f"install it with: pip install 'cbsa-torch[{extra}]'"
        )
