"""What CBSA is measured against: the paper in plain PyTorch, Nystroem attention, a lower bound of the cost."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NaiveCBSA(nn.Module):
    """The naive baseline: the steps of section 3.2 one after the other, for a class token and a square grid.

    Plain PyTorch without regard to memory layout; no part of the library is used. The parameters have the names
    and shapes of :class:`cbsa_torch.CBSA`'s, so that each loads the other's.

    Examples:
        >>> from cbsa_torch import CBSA
        >>> from cbsa_torch.bench.baselines import NaiveCBSA
        >>> naive, x = NaiveCBSA(64, 4), torch.randn(2, 65, 64)
        >>> ours = CBSA(64, 4)
        >>> ours.load_state_dict(naive.state_dict())
        <All keys matched successfully>
        >>> torch.allclose(ours(x), naive(x), atol=1e-5)
        True
    """

    def __init__(self, dim: int, num_heads: int, num_representatives: int = 64) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.pool = nn.AdaptiveAvgPool2d(int(num_representatives**0.5))
        self.step_representatives = nn.Parameter(torch.randn(num_heads))
        self.step_tokens = nn.Parameter(torch.randn(num_heads))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """``(B, 1 + side^2, C)``; the grid that a block hands on is not looked at."""
        b, n, c = x.shape
        side = int((n - 1) ** 0.5)
        w = self.qkv(x)
        rep = self.pool(w[:, 1:].reshape(b, side, side, c).permute(0, 3, 1, 2)).reshape(b, c, -1)
        rep = rep.permute(0, 2, 1).reshape(b, -1, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        w = w.reshape(b, n, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        attn = (torch.matmul(rep, w.transpose(-1, -2)) * self.scale).softmax(dim=-1)  # extract
        rep = rep + self.step_representatives.view(-1, 1, 1) * torch.matmul(attn, w)
        rep_attn = (torch.matmul(rep, rep.transpose(-1, -2)) * self.scale).softmax(dim=-1)  # contract
        contracted = torch.matmul(rep_attn, rep)
        out = self.step_tokens.view(-1, 1, 1) * torch.matmul(attn.transpose(-1, -2), contracted)  # broadcast
        return self.proj(out.permute(0, 2, 1, 3).reshape(b, n, c))


class NaiveISTA(nn.Module):
    """relu(x + eta (D^T x - D^T D x) - eta lambda), eta = lambda = 0.1.

    By two products with every token, D^T (x - D x), or by three as in the official code, D^T x and D^T (D x).

    Examples:
        >>> from cbsa_torch.bench.baselines import NaiveISTA
        >>> NaiveISTA(64, products=2)(torch.randn(2, 65, 64)).shape
        torch.Size([2, 65, 64])
    """

    def __init__(self, dim: int, products: int) -> None:
        super().__init__()
        self.products = products
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)``."""
        code = F.linear(x, self.weight)
        if self.products == 2:
            gradient = F.linear(x - code, self.weight.t())
        else:
            gradient = F.linear(x, self.weight.t()) - F.linear(code, self.weight.t())
        return F.relu(x + 0.1 * gradient - 0.1 * 0.1)


class _NaiveBlock(nn.Module):
    """x + CBSA(norm(x)), then ISTA(norm(x))."""

    def __init__(self, dim: int, num_heads: int, num_representatives: int, products: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NaiveCBSA(dim, num_heads, num_representatives)
        self.norm2 = nn.LayerNorm(dim)
        self.ista = NaiveISTA(dim, products)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return self.ista(self.norm2(x))


class NaiveCBT(nn.Module):
    """The naive model: the paper's whole Transformer (section 4, Appendix C), as its official code goes.

    Stem, class token, position embedding, blocks of :class:`NaiveCBSA` and :class:`NaiveISTA`, head on the
    class token. Plain PyTorch, for square images of one size in PyTorch's default memory layout; no part of
    the library is used. The parameters have the names and shapes of our CBT's, so that each loads the other's.

    Args:
        img_size: side of the images, a multiple of ``patch_size``, which is a power of two. With fewer patches
            than representatives our CBT has fewer representatives, and computes something else.
        in_chans, num_classes: image channels, logits.
        embed_dim, depth, num_heads, num_representatives: sizes.
        ista_products: products of :class:`NaiveISTA`, 2 or 3.

    Examples:
        >>> from cbsa_torch.bench.baselines import NaiveCBT
        >>> naive = NaiveCBT(32, 4, in_chans=3, num_classes=10, embed_dim=64, depth=1, num_heads=4)
        >>> naive(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        *,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_representatives: int = 64,
        ista_products: int = 2,
    ) -> None:
        super().__init__()
        count = max(patch_size.bit_length() - 1, 1)
        layers: list[nn.Module] = []
        for i in range(count):
            width, stride = embed_dim // 2 ** (count - 1 - i), 1 if patch_size == 1 else 2
            conv = nn.Conv2d(in_chans, width, 3, stride, 1, bias=False)
            layers += [*([nn.GELU()] if i else []), nn.Sequential(conv, nn.BatchNorm2d(width))]
            in_chans = width
        self.stem = nn.Sequential(OrderedDict(proj=nn.Sequential(*layers)))
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        sizes = embed_dim, num_heads, num_representatives, ista_products
        blocks = (_NaiveBlock(*sizes) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, in_chans, img_size, img_size)`` images to ``(B, num_classes)`` logits."""
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x)[:, 0]))


class Nystrom(nn.Module):
    """Nystroem attention of the package ``nystrom-attention`` in the place of timm's; float32 only.

    Its own defaults, but for the landmarks, which are as many as CBSA has representatives.

    Examples:
        >>> from cbsa_torch.bench.baselines import Nystrom
        >>> Nystrom(64, 4, num_landmarks=16)(torch.randn(2, 65, 64)).shape
        torch.Size([2, 65, 64])
    """

    def __init__(self, dim: int, num_heads: int, num_landmarks: int = 64) -> None:
        super().__init__()
        from nystrom_attention import NystromAttention

        head_dim = dim // num_heads
        self.attention = NystromAttention(dim, head_dim, num_heads, num_landmarks=num_landmarks)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """``(B, N, C)``; masks, which a ViT's blocks hand on as None, are not looked at."""
        return self.attention(x)


class LowerBound(nn.Module):
    """Only the products that every implementation computes: both projections and the extraction.

    4 N d^2 + 4 N M d FLOPs, without pooling, softmax, contraction or broadcast. The mean of the extracted
    representatives is added to the output, so that the backward pass computes the gradients of all products.

    Examples:
        >>> from cbsa_torch.bench.baselines import LowerBound
        >>> LowerBound(64, 4)(torch.randn(2, 197, 64)).shape
        torch.Size([2, 197, 64])
    """

    def __init__(self, dim: int, num_heads: int, num_representatives: int = 64) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_subspaces = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.representatives = nn.Parameter(torch.randn(num_heads, num_representatives, dim // num_heads))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """``(B, N, C)``; the grid that a block hands on is not looked at."""
        w = self.to_subspaces(x)
        tokens = w.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        extracted = (self.representatives @ tokens.mT) @ tokens  # (B, H, M, P)
        bias = self.to_out.bias + extracted.mean()
        return F.linear(w, self.to_out.weight, bias)


class MeanPooling(nn.Module):
    """A bag of features to logits: a linear layer with GELU, the mean over the bag, a linear head.

    Examples:
        >>> from cbsa_torch.bench.baselines import MeanPooling
        >>> MeanPooling(32, num_classes=2, dim=64)(torch.randn(1, 500, 32)).shape
        torch.Size([1, 2])
    """

    def __init__(self, in_dim: int, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(in_dim, dim), nn.GELU())
        self.head = nn.Linear(dim, num_classes)

    def forward(
        self, features: Tensor, coords: Tensor | None = None, token_mask: Tensor | None = None
    ) -> Tensor:
        """``(B, N, in_dim)`` to ``(B, num_classes)``; coordinates are not looked at."""
        x = self.embed(features)
        if token_mask is None:
            return self.head(x.mean(1))
        real = token_mask[..., None].to(x.dtype)
        return self.head((x * real).sum(1) / real.sum(1))


class GatedAttentionMIL(nn.Module):
    """Gated attention pooling (Ilse, Tomczak and Welling 2018, arXiv:1802.04712, Eq. 9).

    Weights softmax_n w^T (tanh(V h_n) * sigmoid(U h_n)), V and U to ``hidden`` channels, of the embedded
    features h_n, and a linear head on their weighted mean.

    Examples:
        >>> from cbsa_torch.bench.baselines import GatedAttentionMIL
        >>> GatedAttentionMIL(32, num_classes=2, dim=64)(torch.randn(1, 500, 32)).shape
        torch.Size([1, 2])
    """

    def __init__(self, in_dim: int, num_classes: int, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(in_dim, dim), nn.GELU())
        self.content = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, 1)
        self.head = nn.Linear(dim, num_classes)

    def forward(
        self, features: Tensor, coords: Tensor | None = None, token_mask: Tensor | None = None
    ) -> Tensor:
        """``(B, N, in_dim)`` to ``(B, num_classes)``; coordinates are not looked at."""
        h = self.embed(features)
        scores = self.score(self.content(h).tanh() * self.gate(h).sigmoid())  # (B, N, 1)
        if token_mask is not None:
            scores = scores.masked_fill(~token_mask[..., None], float("-inf"))
        return self.head((scores.softmax(1) * h).sum(1))


class NystromAggregator(nn.Module):
    """Layers of Nystroem attention of the package ``nystrom-attention`` over a class token and the features.

    As in TransMIL (Shao et al. 2021, arXiv:2106.00908), without its convolutions over a square that the bag is
    repeated to fill. float32 only.

    Examples:
        >>> from cbsa_torch.bench.baselines import NystromAggregator
        >>> NystromAggregator(32, num_classes=2, dim=64, depth=1, num_heads=4)(torch.randn(1, 500, 32)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self, in_dim: int, num_classes: int, dim: int, depth: int, num_heads: int, num_landmarks: int = 64
    ) -> None:
        super().__init__()
        from nystrom_attention import NystromAttention

        self.embed = nn.Sequential(nn.Linear(in_dim, dim), nn.LayerNorm(dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.layers = nn.ModuleList(
            NystromAttention(dim, dim // num_heads, num_heads, num_landmarks=num_landmarks)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(
        self, features: Tensor, coords: Tensor | None = None, token_mask: Tensor | None = None
    ) -> Tensor:
        """``(B, N, in_dim)`` to ``(B, num_classes)``; coordinates are not looked at."""
        x = self.embed(features)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        mask = None if token_mask is None else F.pad(token_mask, (1, 0), value=True)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), mask=mask)
        return self.head(self.norm(x[:, 0]))
