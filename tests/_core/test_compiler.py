"""What the package knows of torch.compile is what torch does."""

import torch
from torch import nn

from cbsa_torch._core.compiler import COMPILED, called_while_tracing


def test_a_compiled_module_keeps_the_original_where_we_look():
    layer = nn.Linear(2, 2)
    assert torch.compile(layer, backend="eager")._modules[COMPILED] is layer


def test_the_compiler_calls_and_does_not_trace():
    @called_while_tracing
    def number():
        return 2 if torch.compiler.is_dynamo_compiling() else 3  # traced, it would be 2

    x = torch.ones(2)
    assert torch.equal(torch.compile(lambda x: x * number(), backend="eager", fullgraph=True)(x), 3 * x)
