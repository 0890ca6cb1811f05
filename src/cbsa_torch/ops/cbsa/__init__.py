"""Contract-and-Broadcast Self-Attention: ``api`` is public, ``reference`` is the oracle."""

from cbsa_torch.ops.cbsa.api import cbsa, cbsa_stages

__all__ = ["cbsa", "cbsa_stages"]
