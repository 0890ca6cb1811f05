"""Contract-and-Broadcast Self-Attention: ``api`` is public, ``reference`` is the oracle."""
