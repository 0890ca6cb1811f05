"""Benchmarks: our layers and models beside their baselines and a lower bound, in one run.

``cbsa bench layers`` and ``cbsa bench models`` print tables, and write JSON and plots.
"""

from cbsa_torch._core.optional import require

require("models")
