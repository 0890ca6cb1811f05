"""Benchmarks: our layers and models, their baselines and a lower bound, timed in one run.

``cbsa bench layers`` and ``cbsa bench models`` print tables, and write JSON and plots.
"""

from cbsa_torch._core.optional import require

require("models")
require("interpret")  # for the plots
