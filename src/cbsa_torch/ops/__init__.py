"""Pure functions: the mathematics, without parameters. Needs torch alone."""

from cbsa_torch._core.types import Representatives
from cbsa_torch.ops import counting
from cbsa_torch.ops.agent_attention import agent_attention
from cbsa_torch.ops.cbsa.api import CBSAStages, cbsa, cbsa_stages
from cbsa_torch.ops.coding_rate import coding_rate, compression_rate, rate_reduction
from cbsa_torch.ops.directions import basis_directions, principal_directions
from cbsa_torch.ops.ista import ista_step
from cbsa_torch.ops.linear_attention import linear_attention
from cbsa_torch.ops.linear_cbsa import linear_cbsa
from cbsa_torch.ops.representatives import pool_representatives, representative_grid
from cbsa_torch.ops.softmax_attention import mssa, softmax_attention
from cbsa_torch.ops.tssa import channel_attention, tssa

__all__ = [
    "CBSAStages",
    "Representatives",
    "agent_attention",
    "basis_directions",
    "cbsa",
    "cbsa_stages",
    "channel_attention",
    "coding_rate",
    "compression_rate",
    "counting",
    "ista_step",
    "linear_attention",
    "linear_cbsa",
    "mssa",
    "pool_representatives",
    "principal_directions",
    "rate_reduction",
    "representative_grid",
    "softmax_attention",
    "tssa",
]
