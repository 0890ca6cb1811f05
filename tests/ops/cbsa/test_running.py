"""Extraction from chunks is extraction from all tokens."""

from itertools import pairwise

import torch

from cbsa_torch.ops.cbsa.certified import RunningGram, limit
from cbsa_torch.ops.cbsa.reference import extract
from cbsa_torch.ops.cbsa.running import RunningExtraction, attention

ENDS = (0, 1, 8, 9, 40, 61)


def test_chunks_of_any_size_and_order():
    """Logits of one part lie 10,000 above the others: it alone counts, and nothing overflows."""
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (5, 61, 61))
    places = [slice(a, b) for a, b in pairwise(ENDS)]
    high = keys.clone()
    high[:, :, 40:] += (
        2e4 * queries.sum(2, keepdim=True) / queries.sum(2, keepdim=True).square().sum(-1, keepdim=True)
    )
    for given in (keys, high):
        weights, picked = extract(queries, given, values, 0.5)
        for order in (places, places[::-1]):
            gram = RunningGram(None)
            running = RunningExtraction(queries, 0.5, gram)
            for place in order:
                running.add(given[:, :, place], values[:, :, place], place)
            lse, found = running.results()
            torch.testing.assert_close(found, picked, rtol=1e-12, atol=1e-12)
            for place in places:
                part = attention(queries, given[:, :, place], 0.5, lse)
                torch.testing.assert_close(part, weights[..., place], rtol=1e-9, atol=1e-12)
            eta = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)[:, None, None]
            own = weights @ weights.mT
            torch.testing.assert_close(gram.limit(eta), limit(eta.square() * own, own))
