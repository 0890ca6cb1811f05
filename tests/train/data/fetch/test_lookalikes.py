from __future__ import annotations

import networkx as nx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cbsa_torch.train.data.fetch.lookalikes import close_pairs, join


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_close_pairs_are_those_of_the_definition(count, block, seed):
    generator = np.random.default_rng(seed)
    first, second = generator.integers(0, 4, (2, count, 6)).astype(float)
    expected = {
        (i, j)
        for i in range(count)
        for j in range(count)
        if i != j and np.sqrt(np.mean((first[i] - second[j]) ** 2)) < 1.5
    }
    assert set(close_pairs(first, second, 1.5, block)) == expected


def test_the_limit_itself_is_not_below_it():
    rows = np.array([[0.0, 0.0], [2.0, 2.0]])
    assert close_pairs(rows, rows, 2.0) == []
    assert close_pairs(rows, rows, 2.0001) == [(0, 1), (1, 0)]


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))
    )
)
def test_groups_are_the_connected_components_numbered_by_their_first_member(case):
    count, pairs = case
    graph = nx.Graph(pairs)
    graph.add_nodes_from(range(count))
    components = sorted(nx.connected_components(graph), key=min)
    expected = [next(k for k, members in enumerate(components) if i in members) for i in range(count)]
    assert join(count, pairs).tolist() == expected
