import math

import pytest
import timm
import torch
from torch import nn

import cbsa_torch.models
from cbsa_torch import CBSA, ISTA, MSSA, interpret
from cbsa_torch.nn import MHSA
from tests.helpers.mixers import Called


def largest_cosine(first, second):
    """By projectors: P_i P_j P_i has the squared cosines as eigenvalues. Rows span the subspaces."""
    projectors = []
    for rows in (first.double(), second.double()):
        projectors.append(rows.T @ torch.linalg.pinv(rows @ rows.T, rtol=1e-10) @ rows)
    eigenvalues = torch.linalg.eigvalsh(projectors[0] @ projectors[1] @ projectors[0])
    return math.sqrt(max(eigenvalues[-1].item(), 0))


@pytest.mark.parametrize("mixer", [CBSA, MSSA, MHSA, timm.layers.attention.Attention])
def test_coherence_by_projectors(mixer):
    layer = mixer(24, num_heads=3)
    matrix = interpret.subspace_coherence(nn.Sequential(layer))["0"]
    bases = layer.qkv.weight[:24].unflatten(0, (3, 8))  # the queries' where there are three
    for i in range(3):
        for j in range(3):
            assert matrix[i, j].item() == pytest.approx(largest_cosine(bases[i], bases[j]), abs=1e-5)
    assert torch.equal(matrix, matrix.T)


def test_coherence_by_hand():
    layer = MSSA(4, num_heads=3, head_dim=2)
    angle = 0.4
    with torch.no_grad():
        layer.qkv.weight.copy_(
            torch.tensor(
                [
                    [1.0, 0, 0, 0],
                    [1, 2, 0, 0],  # head 1: the plane of the first two axes
                    [0, math.cos(angle), math.sin(angle), 0],
                    [0, 0, 0, 5],  # head 2: at an angle to it, and the last axis
                    [0, 0, 0, 1],
                    [0, 0, 0, 2],  # head 3: only a line, in head 2
                ]
            )
        )
    expected = torch.tensor([[1, math.cos(angle), 0], [math.cos(angle), 1, 1], [0, 1, 1]]).double()
    assert torch.allclose(interpret.subspace_coherence(layer)[""], expected, atol=1e-6)
    with torch.no_grad():
        layer.qkv.weight[4:] = 0
        layer.qkv.weight[0] = float("nan")
    matrix = interpret.subspace_coherence(layer)[""]
    assert matrix[2].tolist()[1:] == [0, 0]
    assert matrix[0].isnan().all()


def test_orthogonal_layers_are_orthogonal_and_wide_heads_overlap():
    layer = CBSA(16, 4, orthogonal=True)
    matrix = interpret.subspace_coherence(layer)[""]
    assert torch.allclose(matrix, torch.eye(4).double(), atol=1e-5)
    wide = interpret.subspace_coherence(MSSA(4, num_heads=2, head_dim=8))[""]  # both fill the space
    assert torch.allclose(wide, torch.ones(2, 2).double(), atol=1e-6)


def test_ranks_by_explicit_svd(model, images):
    ranks = interpret.attention_ranks(model, images.split(2))
    assert (ranks.layers, ranks.images) == ([f"blocks.{i}.attn" for i in range(3)], 5)
    with interpret.capture(model) as records:
        model(images)
    for i, record in enumerate(records.values()):
        for h in range(2):
            rank, effective = [], []
            for a in record.stages.attention[:, h]:
                singular = torch.linalg.eigvalsh(a.double() @ a.double().T).clamp(min=0).sqrt()
                rank.append(torch.linalg.matrix_rank(a).item())
                share = singular / singular.sum()
                effective.append(math.exp(-sum(s * math.log(s) for s in share.tolist() if s > 0)))
            assert ranks.rank[i][h] == pytest.approx(sum(rank) / 5)
            assert ranks.effective_rank[i][h] == pytest.approx(sum(effective) / 5, rel=1e-4)


class Given(nn.Module):
    """Representatives with a known attention."""

    gives_attention = True

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, tokens, grid_size=None, token_mask=None):
        attention = self.attention.expand(len(tokens), -1, -1, -1)
        return cbsa_torch.ops.Representatives(attention @ tokens, None, attention)


def test_ranks_by_hand():
    one = torch.full((3, 4), 0.25)  # rank 1
    two = torch.eye(4)[[0, 1, 1]]  # singular values 1, sqrt 2, 0
    layer = CBSA(4, 2, representatives=Given(torch.stack([one, two])[None]))
    ranks = interpret.attention_ranks(nn.Sequential(layer), [torch.randn(2, 4, 4)])
    assert ranks.rank == [[1, 2]]
    p = math.sqrt(2) / (1 + math.sqrt(2))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert ranks.effective_rank[0] == pytest.approx([1, math.exp(entropy)], rel=1e-5)
    none = CBSA(4, 1, representatives=Given(torch.zeros(1, 1, 3, 4)))
    ranks = interpret.attention_ranks(nn.Sequential(none), [torch.randn(2, 4, 4)])
    assert (ranks.rank, ranks.effective_rank) == ([[0]], [[0]])
    broken = CBSA(4, 1, representatives=Given(torch.full((1, 1, 3, 4), math.nan)))
    ranks = interpret.attention_ranks(nn.Sequential(broken), [torch.randn(2, 4, 4)])
    assert math.isnan(ranks.rank[0][0])


def test_padding_does_not_change_ranks():
    layer = CBSA(8, 2, num_representatives=4, num_prefix_tokens=0)

    model, x = Called(layer, grid=(2, 2)), torch.randn(3, 4, 8)
    alone = interpret.attention_ranks(model, [x])
    model.grid, model.mask = (2, 4), torch.tensor([[True, True, False, False] * 2] * 3)
    padded = torch.full((3, 8, 8), math.nan)
    padded[:, model.mask[0]] = x
    with_padding = interpret.attention_ranks(model, [padded])
    assert with_padding.rank == alone.rank
    assert with_padding.effective_rank[0] == pytest.approx(alone.effective_rank[0], rel=1e-5)


def test_sparsity_of_every_ista_whatever_the_batches(model, images):
    measured = interpret.ista_sparsity(model, images.split(2))
    assert (measured.layers, measured.images) == ([f"blocks.{i}.ista" for i in range(3)], 5)
    assert measured.zeros == pytest.approx(interpret.ista_sparsity(model, [images]).zeros, abs=1e-3)
    assert all(0 < zeros < 1 for zeros in measured.zeros)


def test_sparsity_by_hand():
    layer = ISTA(4, step_size=0.5, sparsity=0.2)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))  # relu(x + 0.5 (x - x) - 0.1)
    x = torch.tensor([[[0.05, 0.2, -3.0, 1.0]]])
    assert interpret.ista_sparsity(nn.Sequential(layer), [x, x]).zeros == [0.5]
    compiled = torch.compile(nn.Sequential(layer), backend="eager")
    assert interpret.ista_sparsity(compiled, [x]) == interpret.Sparsity(["0"], [0.5], 1)
    part = nn.Sequential(torch.compile(layer, backend="eager"))
    assert interpret.ista_sparsity(part, [x]) == interpret.Sparsity(["0"], [0.5], 1)


def test_hooks_of_sparsity_are_gone_whatever_happens(model, images):
    def interrupted():
        yield images
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interpret.ista_sparsity(model, interrupted())
    assert sum(len(m._forward_hooks) for m in model.modules()) == 0


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m, x: interpret.subspace_coherence(nn.Linear(2, 2)), ValueError, "Linear has no CBSA layer"),
        (lambda m, x: interpret.attention_ranks(MSSA(4, 2), [x]), ValueError, "MSSA has no CBSA layer"),
        (lambda m, x: interpret.attention_ranks(m, [[x]]), TypeError, "batches must yield tensors"),
        (lambda m, x: interpret.ista_sparsity(MSSA(4, 2), [x]), ValueError, "MSSA has no ISTA layer"),
        (lambda m, x: interpret.ista_sparsity(m, []), ValueError, "at least one batch"),
    ],
)
def test_bad_arguments_are_named(model, images, call, kind, message):
    with pytest.raises(kind, match=message):
        call(model, images)


def test_ranks_and_maps_of_certified_steps_are_of_all_weights():
    """Without extraction B is the pooling: of full rank, and the class token takes no part."""
    layer = CBSA(8, 2, step="certified", num_representatives=4, num_prefix_tokens=1).eval()
    torch.nn.init.zeros_(layer.step_representatives)
    model, x = Called(layer, grid=(4, 4)), torch.randn(3, 17, 8)
    ranks = interpret.attention_ranks(model, [x])
    assert ranks.rank == [[4, 4]]
    assert ranks.effective_rank[0] == pytest.approx([4, 4], rel=1e-5)
    with interpret.capture(model) as records:
        model(x)
    (record,) = records.values()
    assert not interpret.cls_attention_maps(record).any()
    cell = interpret.receptive_fields(record)[0, 0, 0]
    expected = torch.zeros(4, 4)
    expected[:2, :2] = 1 / 4
    torch.testing.assert_close(cell, expected)
    second = interpret.cls_attention_maps(record, token=1)[0, 0]
    torch.testing.assert_close(second, expected / 4)
