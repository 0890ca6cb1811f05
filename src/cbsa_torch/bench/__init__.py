"""Benchmarks: our layers and models beside their baselines, in one run, with what no form can avoid.

``cbsa bench layers`` and ``cbsa bench models`` print tables, and write JSON and plots.
"""

from cbsa_torch._core.optional import require

for _module in ("timm", "matplotlib", "rich"):
    require(_module, extra="train")
