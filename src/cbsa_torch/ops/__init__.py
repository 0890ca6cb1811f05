"""Pure functions: the mathematics, without parameters. Needs torch alone."""

from cbsa_torch.ops.cbsa.api import CBSAStages, cbsa, cbsa_stages
from cbsa_torch.ops.coding_rate import coding_rate, compression_rate, rate_reduction
from cbsa_torch.ops.ista import ista_step
from cbsa_torch.ops.representatives import pool_representatives, representative_grid

__all__ = [
    "CBSAStages",
    "cbsa",
    "cbsa_stages",
    "coding_rate",
    "compression_rate",
    "ista_step",
    "pool_representatives",
    "rate_reduction",
    "representative_grid",
]
