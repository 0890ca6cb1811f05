"""Modules: parameters around the functions of :mod:`cbsa_torch.ops`. Needs torch alone."""

from cbsa_torch.nn.adapted_cbsa import AdaptedCBSA
from cbsa_torch.nn.agent_attention import AgentAttention
from cbsa_torch.nn.block import ResidualBlock, WhiteBoxBlock
from cbsa_torch.nn.cbsa import CBSA
from cbsa_torch.nn.grid_hook import install_grid_hook, remove_grid_hook
from cbsa_torch.nn.grids import follow_grid
from cbsa_torch.nn.ista import ISTA
from cbsa_torch.nn.linear_attention import LinearAttention
from cbsa_torch.nn.linear_cbsa import LinearCBSA
from cbsa_torch.nn.map_block import CBSABlock
from cbsa_torch.nn.mixer import TokenMixer
from cbsa_torch.nn.packing import Packing
from cbsa_torch.nn.representatives import (
    AllTokens,
    BasisDirections,
    LearnedRepresentatives,
    PooledRepresentatives,
    PrincipalDirections,
)
from cbsa_torch.nn.softmax_attention import MHSA, MSSA
from cbsa_torch.nn.stem import ConvStem, LinearStem
from cbsa_torch.nn.tokens import Heads, MixerInput
from cbsa_torch.nn.tssa import TSSA
from cbsa_torch.ops.coordinates import Coordinates

__all__ = [
    "CBSA",
    "ISTA",
    "MHSA",
    "MSSA",
    "TSSA",
    "AdaptedCBSA",
    "AgentAttention",
    "AllTokens",
    "BasisDirections",
    "CBSABlock",
    "ConvStem",
    "Coordinates",
    "Heads",
    "LearnedRepresentatives",
    "LinearAttention",
    "LinearCBSA",
    "LinearStem",
    "MixerInput",
    "Packing",
    "PooledRepresentatives",
    "PrincipalDirections",
    "ResidualBlock",
    "TokenMixer",
    "WhiteBoxBlock",
    "follow_grid",
    "install_grid_hook",
    "remove_grid_hook",
]
