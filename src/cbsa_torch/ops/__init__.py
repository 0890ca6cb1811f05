"""Pure functions: the mathematics, without parameters. Needs torch alone."""

from cbsa_torch._core.types import CBSAStages, CellPooling, Cells, GridPooling, Representatives
from cbsa_torch.ops import counting
from cbsa_torch.ops.agent_attention import agent_attention
from cbsa_torch.ops.cbsa.api import cbsa, certified_cbsa, contract_and_broadcast
from cbsa_torch.ops.cbsa.inputs import CBSAInputs, cbsa_inputs
from cbsa_torch.ops.cbsa.reference import cbsa_stages
from cbsa_torch.ops.coding_rate import coding_rate, compression_rate, rate_reduction
from cbsa_torch.ops.coordinates import find_cells, pool_by_coordinates
from cbsa_torch.ops.directions import basis_directions, principal_directions
from cbsa_torch.ops.ista import ista_matrix, ista_step
from cbsa_torch.ops.linear_attention import linear_attention
from cbsa_torch.ops.linear_cbsa import linear_cbsa
from cbsa_torch.ops.pooling import pool_representatives, representative_grid
from cbsa_torch.ops.softmax_attention import mssa, softmax_attention
from cbsa_torch.ops.tssa import channel_attention, tssa

__all__ = [
    "CBSAInputs",
    "CBSAStages",
    "CellPooling",
    "Cells",
    "GridPooling",
    "Representatives",
    "agent_attention",
    "basis_directions",
    "cbsa",
    "cbsa_inputs",
    "cbsa_stages",
    "certified_cbsa",
    "channel_attention",
    "coding_rate",
    "compression_rate",
    "contract_and_broadcast",
    "counting",
    "find_cells",
    "ista_matrix",
    "ista_step",
    "linear_attention",
    "linear_cbsa",
    "mssa",
    "pool_by_coordinates",
    "pool_representatives",
    "principal_directions",
    "rate_reduction",
    "representative_grid",
    "softmax_attention",
    "tssa",
]
