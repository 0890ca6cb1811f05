"""The tokens of a few items, tile by tile, in plain PyTorch: any device, any dtype.

Every tile has a softmax of its own, P = exp(S - l_tile), by torch's kernel, which is several times faster
than an exponential written out. The softmax over all tokens is A = exp(l_tile - l) P: a share per
representative and tile, which goes into the small operands and never touches the M x T weights.

What the tokens are given is ``(B, H, M, P)`` per head, or ``(B, H, M, C)`` jointly, then summed over heads:
the output projection folded into the contractions, A^T (C U_out), so that the heads' own output is never
written and the broadcast costs no product beyond that of the projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch.ops.cbsa.certified import RunningGram

TILE = 1024
"""Tokens per tile, more or less: all tiles of an item are of one size."""
GROUP = 2 * TILE
"""Tokens of short items that are handled together."""
KEEP = 2**23
"""How many weights of one group the forward pass may keep from extraction to broadcast, instead of computing
them again: 32 MiB in float32, about what a last-level cache holds."""


def log_sum_exp(logits: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """That of ``logits`` over the last axis, from their softmax: the largest weight is exp(max S - l)."""
    return logits.amax(-1).to(dtype) - weights.amax(-1).to(dtype).log_()


class Tiles:
    """The passes over the tokens of a few items.

    Args:
        representatives: ``(B, H, M, P)``, in the dtype to compute in.
        keys: ``(B, H, N, P)``, any strides and dtype.
        values: like ``keys``, or None if they are the keys.
        mask: ``(B, N)`` bool; rows of masked tokens are read as zeros, whatever they hold.
        scale: factor on the logits.
        normalizer: what :meth:`extract` returned for them: the share exp(l_tile - l) of every tile.
    """

    def __init__(
        self,
        representatives: Tensor,
        keys: Tensor,
        values: Tensor | None,
        mask: Tensor | None,
        scale: float,
        normalizer: Tensor | None = None,
    ) -> None:
        b, h, m, _ = representatives.shape
        n = keys.shape[2]
        self.representatives = scale * representatives
        self.keys, self.values, self.mask, self.scale = keys, values, mask, scale
        self.shares = normalizer
        tiles = max(1, (n + TILE // 2) // TILE)
        self.places = [slice(i * n // tiles, (i + 1) * n // tiles) for i in range(tiles)]
        self.keeps = tiles == 1 or (normalizer is None and b * h * m * n <= KEEP)
        self.kept: dict[int, Tensor] = {}
        self.whole: dict[str, Tensor] = {}  # what was read of the only tile

    @staticmethod
    def groups(b: int, n: int) -> list[slice]:
        """Items that are handled together: short ones, in groups of about one size; long ones alone."""
        count = -(-b // max(1, GROUP // max(1, n)))
        return [slice(i * b // count, (i + 1) * b // count) for i in range(count)]

    @staticmethod
    def normalizer_size(n: int) -> int:
        """A bound on the number of tiles: no comparison, never one, so that exported programs keep N open."""
        return n // TILE + 2

    def extract(self, gram: RunningGram | None = None) -> tuple[Tensor, Tensor]:
        """R = A V ``(B, H, M, P)``, zero for items without real tokens, and the shares ``(B, H, M, tiles)``.

        The weights are also added to ``gram``, those of items without real tokens as if these were real.
        """
        parts, lses = [], []
        for i, place in enumerate(self.places):
            keys = self._read("keys", self.keys, place)
            logits = self._logits(keys, place)
            weights = torch.softmax(logits, dim=-1)
            if self.keeps:
                self.kept[i] = weights
            values = keys if self.values is None else self._read("values", self.values, place)
            parts.append(weights @ values)
            lse = None
            if len(self.places) > 1:
                lse = log_sum_exp(logits, weights, logits.dtype)
                lses.append(lse)
            if gram is not None:
                gram.add(weights, lse, place)
        if len(parts) == 1:
            picked, shares = parts[0], torch.ones_like(parts[0][..., :1])
        else:
            shares = torch.stack(lses, -1).softmax(-1)
            picked = torch.stack(parts, -2).mul_(shares[..., None]).sum(-2)
        if self.mask is not None:
            empty = ~self.mask.any(-1)[:, None, None, None]
            picked, shares = picked.masked_fill(empty, 0.0), shares.masked_fill(empty, 0.0)
        self.shares = shares
        return picked, shares

    def broadcast(self, carried: Tensor, bias: Tensor | None, output: Tensor) -> None:
        """Write A^T ``carried`` into ``output``.

        ``carried`` is kappa C ``(B, H, M, P)`` for ``(B, H, N, P)`` per head, or kappa C U_out ``(B, H, M, C)``
        for ``(B, N, C)`` jointly.
        """
        for i, place in enumerate(self.places):
            weights, share = self._weights(i), self._share(i)
            shared = carried if self._is_plain() else share * carried
            if output.ndim == 4:
                output[:, :, place] = weights.mT @ shared
                continue
            small, wide = self._joint(shared), self._joint(weights)
            for item, rows in enumerate(output):  # one product each, written in place
                if rows.dtype == small.dtype:
                    torch.mm(wide[item].mT, small[item], out=rows[place])
                else:
                    rows[place] = wide[item].mT @ small[item]
                if bias is not None:
                    rows[place] += bias

    def collect(self, gradient: Tensor) -> Tensor:
        """A dO, ``(B, H, M, P)`` or ``(B, H, M, C)``, from a gradient shaped like the output."""
        if self._is_plain():
            return self._collect_tile(0, gradient)
        collected = self.representatives.new_zeros(*self.representatives.shape[:3], gradient.shape[-1])
        for i in range(len(self.places)):
            collected.addcmul_(self._share(i), self._collect_tile(i, gradient))
        return collected

    def _collect_tile(self, i: int, gradient: Tensor) -> Tensor:
        weights = self._weights(i)
        if gradient.ndim == 4:
            return weights @ self._read("gradient", gradient, self.places[i])
        part = self._joint(weights) @ self._joint_rows(gradient, self.places[i])
        return part.view(*weights.shape[:3], -1).to(weights.dtype)

    def differentiate(
        self,
        gradient: Tensor,
        *,
        carried: Tensor,
        collected: Tensor,
        d_picked: Tensor,
        picked: Tensor,
        d_keys: Tensor,
        d_values: Tensor | None,
    ) -> Tensor:
        """Write dK and dV (dK + dV without ``d_values``); return the gradient of the representatives through A.

        ``collected`` is A dO, ``d_picked`` the gradient of R. D_i = sum_n A_in dA_in needs no pass of its own:
        it is made of tensors of size M x P.
        """
        row_sums = ((carried * collected).sum(-1) + (d_picked * picked).sum(-1))[..., None]  # D, (B, H, M, 1)
        d_representatives = torch.zeros_like(self.representatives)
        for i in range(len(self.places)):
            tile = i, gradient, carried, row_sums, d_picked, d_keys, d_values
            d_representatives += self._differentiate_tile(*tile)
        return d_representatives.mul_(self.scale)

    def _differentiate_tile(
        self,
        i: int,
        gradient: Tensor,
        carried: Tensor,
        row_sums: Tensor,
        d_picked: Tensor,
        d_keys: Tensor,
        d_values: Tensor | None,
    ) -> Tensor:
        """A function of its own, so that what one tile needs is gone before the next comes."""
        b, h, m, _ = self.representatives.shape
        weights, share, place = self._weights(i).flatten(0, 1), self._share(i), self.places[i]
        keys = self._read("keys", self.keys, place)
        values = keys if self.values is None else self._read("values", self.values, place)
        d_rows = (share * d_picked).flatten(0, 1)  # (B H, M, P)
        shift = -share * row_sums
        if gradient.ndim == 4:
            rows = self._read("gradient", gradient, place).flatten(0, 1)
            d_weights = torch.baddbmm(shift.flatten(0, 1), (share * carried).flatten(0, 1), rows.mT)
        else:
            d_weights = self._joint(share * carried) @ self._joint_rows(gradient, place).mT  # (B, H M, T)
            d_weights = d_weights.to(weights.dtype).add_(shift.flatten(1, 2)).view(b * h, m, -1)
        d_weights.baddbmm_(d_rows, values.flatten(0, 1).mT)
        d_logits = d_weights.mul_(weights)  # (B H, M, T)
        representatives = self.representatives.flatten(0, 1)
        d_v = weights.mT @ d_rows  # (B H, T, P)
        if d_values is None:
            d_keys[:, :, place] = d_v.baddbmm_(d_logits.mT, representatives).unflatten(0, (b, h))
        else:
            d_keys[:, :, place] = (d_logits.mT @ representatives).unflatten(0, (b, h))
            d_values[:, :, place] = d_v.unflatten(0, (b, h))
        return (d_logits @ keys.flatten(0, 1)).view(b, h, m, -1)

    def _read(self, name: str, rows: Tensor, place: slice) -> Tensor:
        """``(B, H, T, P)`` of ``rows``, zero where masked: padding may hold NaN.

        One item is read in place; several are copied, since no stride joins item and head. What the only tile
        holds is read once.
        """
        if name in self.whole:
            return self.whole[name]
        part = rows[:, :, place].to(self.representatives.dtype)
        if self.mask is not None:
            part = part.masked_fill(~self.mask[:, None, place, None], 0.0)
        if part.shape[0] > 1:
            part = part.contiguous()
        if len(self.places) == 1:
            self.whole[name] = part
        return part

    def _logits(self, keys: Tensor, place: slice) -> Tensor:
        """``(B, H, M, T)``. The lowest number stands for -inf: a tile without any real token gets a
        log-sum-exp that makes its share vanish beside any other.
        """
        logits = self.representatives @ keys.mT
        if self.mask is not None:
            logits.masked_fill_(~self.mask[:, None, None, place], torch.finfo(logits.dtype).min)
        return logits

    def _weights(self, i: int) -> Tensor:
        """The softmax of tile ``i`` alone, ``(B, H, M, T)``."""
        if i in self.kept:
            return self.kept[i]
        place = self.places[i]
        weights = torch.softmax(self._logits(self._read("keys", self.keys, place), place), dim=-1)
        if self.keeps:
            self.kept[i] = weights
        return weights

    def _is_plain(self) -> bool:
        """Whether every share is 1: one tile, and no items without real tokens."""
        return len(self.places) == 1 and self.mask is None

    def _share(self, i: int) -> Tensor:
        """``(B, H, M, 1)``."""
        assert self.shares is not None, "extract comes first"
        return self.shares[..., i, None]

    def _joint(self, rows: Tensor) -> Tensor:
        """``(B, H, M, T)`` as ``(B, H M, T)``, operand of a product over all heads.

        Such products are as large as the projection they stand for, and take the precision that it would:
        bfloat16 if the keys have it.
        """
        dtype = torch.bfloat16 if self.keys.dtype == torch.bfloat16 else rows.dtype
        return rows.flatten(1, 2).to(dtype)

    def _joint_rows(self, gradient: Tensor, place: slice) -> Tensor:
        """``(B, T, C)`` of a joint gradient.

        Masked tokens have weights of zero; their gradient is cleared for it may hold NaN.
        """
        dtype = torch.bfloat16 if self.keys.dtype == torch.bfloat16 else self.representatives.dtype
        part = gradient[:, place].to(dtype)
        return part if self.mask is None else part.masked_fill(~self.mask[:, place, None], 0.0)
