import pytest
import torch
from torch import fx, nn

from cbsa_torch._core.fx import fx_leaf


@fx_leaf
def halved(x, by=2):
    return x / by if x.shape[0] > 1 else x


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def fx_arguments(self, tracer):
        return {"shift": 1.0}

    @fx_leaf
    def forward(self, x, shift=0.0):
        return self.weight * x + shift if len(x) else x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Layer()

    def forward(self, x):
        return self.layer(halved(x, by=4)) + self.layer(x, 5.0)


def test_leaves_are_one_call_each_and_decide_when_the_graph_runs():
    model = Model()
    graph = fx.symbolic_trace(model)
    called = [node.op for node in graph.graph.nodes if node.op.startswith("call")]
    assert called == ["call_function", "call_module", "call_module", "call_function"]
    for x in (torch.ones(1), torch.ones(2)):
        first = x if len(x) == 1 else x / 4
        assert torch.equal(
            graph(x), (3 * first + 1) + (3 * x + 5)
        )  # the shift is the graph's, unless it is given
    graph(torch.ones(2)).sum().backward()
    assert model.layer.weight.grad.item() == 2.5
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 0.75 + 3 + 5))


def test_a_leaf_alone_is_no_graph():
    with pytest.raises(TypeError, match="Layer is one node of FX graphs, with none inside"):
        fx.symbolic_trace(Layer())
