"""Modules: parameters around the functions of :mod:`cbsa_torch.ops`. Needs torch alone."""

from cbsa_torch.nn.block import WhiteBoxBlock
from cbsa_torch.nn.cbsa import CBSA
from cbsa_torch.nn.ista import ISTA
from cbsa_torch.nn.representatives import LearnedRepresentatives, PooledRepresentatives
from cbsa_torch.nn.stem import ConvStem

__all__ = [
    "CBSA",
    "ISTA",
    "ConvStem",
    "LearnedRepresentatives",
    "PooledRepresentatives",
    "WhiteBoxBlock",
]
