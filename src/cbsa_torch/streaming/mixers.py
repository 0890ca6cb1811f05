"""What a layer needs of all tokens, gathered chunk by chunk, and its update of a chunk.

Every mixer is told all tokens ``gathers`` times and then updates them: ``add(x, place)`` for each chunk and
``finish()``, as often as that, then ``update(x, place)`` for each chunk. What it keeps between two sweeps is
``saved``, a few tensors of a size that does not depend on the number of tokens. Sums over chunks are taken in
float64 where the device has it.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch._core.linear import call_changes, is_plain_linear
from cbsa_torch._core.precision import compute_dtype, solve_dtype
from cbsa_torch._core.types import CellPooling, Cells, GridPooling, GridSize
from cbsa_torch.nn import CBSA, MHSA, MSSA, TSSA, AgentAttention, Coordinates, LinearCBSA, TokenMixer
from cbsa_torch.nn.representatives import LearnedRepresentatives, PooledRepresentatives
from cbsa_torch.nn.tokens import Heads, MixerInput
from cbsa_torch.ops.cbsa.certified import RunningGram
from cbsa_torch.ops.cbsa.contraction import contract
from cbsa_torch.ops.cbsa.running import RunningExtraction, attention
from cbsa_torch.ops.linear_cbsa import spectral_filter
from cbsa_torch.ops.token_weights import columns, gram
from cbsa_torch.ops.tssa import MEMBERSHIP_FLOOR, memberships

Place = GridSize | Coordinates | None
"""Where the tokens after the prefix are."""


class Gathered(abc.ABC):
    """What a mixer has gathered of the tokens.

    Args:
        mixer: the layer.
        length: all tokens N, prefix tokens included.
        place: grid or coordinates of the tokens after the prefix; None: they have neither.
        num_prefix_tokens: before these.
    """

    gathers = 1
    """How often it is told all tokens before it can update them."""

    def __init__(self, mixer: TokenMixer, length: int, place: Place, num_prefix_tokens: int) -> None:
        self.length = length
        self.saved: dict[str, Tensor] = {}
        self.first_row: Tensor | None = None  # of the map, from token 0

    @abc.abstractmethod
    def add(self, x: Tensor, place: slice) -> None:
        """Gather from the tokens ``(1, T, C)``, normalised, at ``place``."""

    def finish(self) -> None:  # noqa: B027  (some have nothing to do)
        """All tokens were told once more."""

    @abc.abstractmethod
    def update(self, x: Tensor, place: slice) -> Tensor:
        """The update ``(1, T, C)`` of such tokens."""

    @abc.abstractmethod
    def map_row(self, x: Tensor, place: slice) -> Tensor:
        """How much token 0 attends to each of them, ``(H, T)``; see ``interpret.cls_attention_maps``.

        The chunk of token 0 comes first.
        """

    @property
    def numbers_per_token(self) -> int:
        """About how many numbers a token takes while it is told or updated."""
        return 0

    def _sum(self, name: str, part: Tensor) -> None:
        part = part.to(solve_dtype(part))
        self.saved[name] = self.saved[name] + part if name in self.saved else part


def _pooling(
    strategy: PooledRepresentatives, place: Place, first: int
) -> tuple[GridPooling | CellPooling, int]:
    """How tokens are pooled, and into how many representatives."""
    if isinstance(place, Coordinates):
        if not first:
            raise ValueError("coords need layout='standard': 'official' is a way of pooling over grids")
        index, counts, order = place.cells(strategy.num_representatives)
        count = int((counts > 0).sum())  # those that do not exist come last
        return CellPooling(Cells(index, counts[:, :count], order), first), count
    assert place is not None, "the model needs coordinates"
    cells = ops.representative_grid(place, strategy.num_representatives)
    return GridPooling(place, cells, first), math.prod(cells)


def _heads(mixer: TokenMixer, x: Tensor) -> Heads:
    return mixer.project(MixerInput(x, None, None, 0))


def _wide(rows: Tensor) -> Tensor:
    return rows.to(compute_dtype(rows.dtype))


class _Represented(Gathered):
    """Mixers with representatives, or agents: they pool them, unless they are learned, and extract."""

    def __init__(self, mixer: CBSA | AgentAttention, length: int, place: Place, num_prefix_tokens: int) -> None:
        super().__init__(mixer, length, place, num_prefix_tokens)
        strategy = mixer.representatives
        self.scale = mixer.head_dim**-0.5
        self.pooling: GridPooling | CellPooling | None = None
        self.running: RunningExtraction | None = None
        self.dtype: torch.dtype | None = None  # of what is pooled
        if type(strategy) is PooledRepresentatives:
            first = num_prefix_tokens if mixer.layout == "standard" else 0
            self.pooling, self.count = _pooling(strategy, place, first)
            self.gathers = 2
        elif type(strategy) is LearnedRepresentatives:
            self.count = strategy.values.shape[1]
        else:
            raise ValueError(
                f"{type(mixer).__name__} with representatives {type(strategy).__name__} cannot be streamed: "
                "they may need all tokens at once; 'pool' and 'learned' do not"
            )
        self.mixer: CBSA | AgentAttention = mixer
        # Averages and linear layers commute: tokens are pooled, then projected. What hooks and adapters make of
        # a layer need not be linear.
        self.pools_queries = not (isinstance(mixer.q_norm, nn.Identity) and is_plain_linear(mixer.qkv))

    def add(self, x: Tensor, place: slice) -> None:
        """First pool, then extract."""
        if self.pooling is not None and "representatives" not in self.saved:
            rows = _heads(self.mixer, x).queries.transpose(1, 2).flatten(2) if self.pools_queries else x
            self.dtype, rows = rows.dtype, _wide(rows)
            self._sum("pooled", columns(self.pooling, place, rows)[0] @ rows)
            return
        heads = _heads(self.mixer, x)
        keys = _wide(heads.keys)
        if self.running is None:
            self.running = RunningExtraction(self._first_guess(heads), self.scale, self._gram(keys))
        values = keys if heads.values is heads.keys else _wide(heads.values)
        self.running.add(keys, values, place)

    def finish(self) -> None:
        """Keep the pooled representatives, or what was extracted."""
        if self.running is None:
            pooled = self.saved.pop("pooled").to(dtype=self.dtype)
            if self.pools_queries:
                queries = pooled.unflatten(-1, (self.mixer.num_heads, -1)).transpose(1, 2)
            else:
                queries = _heads(self.mixer, pooled).queries
            self.saved["representatives"] = queries.contiguous()
            return
        self.saved["lse"], self.saved["picked"] = self.running.results()
        self.running = None

    def _first_guess(self, heads: Heads) -> Tensor:
        if "representatives" not in self.saved:
            strategy = self.mixer.representatives
            assert strategy is not None, "learned"
            self.saved["representatives"] = strategy(heads.queries, None, None).values
        return _wide(self.saved["representatives"])

    def _gram(self, like: Tensor) -> RunningGram | None:
        return None

    def _attention(self, heads: Heads) -> Tensor:
        """A^T of these tokens, ``(1, H, M, T)``."""
        return attention(self._first_guess(heads), _wide(heads.keys), self.scale, self.saved["lse"])

    @property
    def numbers_per_token(self) -> int:
        """Weights of representatives, and the pooling's."""
        return (3 * self.mixer.num_heads + 2) * self.count


class GatheredCBSA(_Represented):
    """CBSA: (pooled initial guesses,) extraction, contraction, broadcast; certified steps, too."""

    mixer: CBSA

    def _gram(self, like: Tensor) -> RunningGram | None:
        if self.mixer.step != "certified":
            return None
        pooling = self.pooling
        self.gram = RunningGram(None if pooling is None else lambda place: columns(pooling, place, like))
        return self.gram

    def finish(self) -> None:
        """Keep also the limit of a certified step, a sum over tokens."""
        extracted = self.running is not None
        super().finish()
        if extracted and self.mixer.step == "certified":
            wide = self.saved["picked"]
            of_pi = None if self.pooling is None else gram(self.pooling, wide)
            self.saved["limit"] = self.gram.limit(self._eta().to(wide.dtype), of_pi)

    def _eta(self) -> Tensor:
        assert self.mixer.step_representatives is not None, "of representatives that are extracted"
        return self.mixer.step_representatives[:, None, None]

    def _carried(self, like: Tensor) -> Tensor:
        """Kappa C ``(1, H, M, P)``; recomputed for each chunk, being no larger than one."""
        eta = self._eta().to(like.dtype)
        rep = _wide(self.saved["representatives"]) + eta * self.saved["picked"].to(like.dtype)
        contracted = contract(rep, self.mixer.contraction, self.scale, self.mixer.eps, None)
        if self.mixer.step_logit is not None:
            fraction = self.mixer.step_logit.sigmoid().to(like.dtype)
            return -(fraction * self.saved["limit"].to(like.dtype))[..., None, None] * contracted
        assert self.mixer.step_tokens is not None, "of the other steps"
        unit = self.length / self.count if self.mixer.step == "relative" else 1.0
        return unit * self.mixer.step_tokens.to(like.dtype)[:, None, None] * contracted

    def _weights(self, heads: Heads, place: slice) -> Tensor:
        """A^T, of a certified step B, ``(1, H, M, T)``."""
        weights = self._attention(heads)
        if self.mixer.step != "certified":
            return weights
        weights = self._eta().to(weights.dtype) * weights
        return weights if self.pooling is None else weights + columns(self.pooling, place, weights)

    def update(self, x: Tensor, place: slice) -> Tensor:
        """Broadcast."""
        heads = _heads(self.mixer, x)
        weights = self._weights(heads, place)
        mixed = weights.mT @ self._carried(weights)
        return self.mixer.project_out(mixed.to(heads.queries.dtype), heads)

    def map_row(self, x: Tensor, place: slice) -> Tensor:
        """Of A A^T, or of B^T B."""
        weights = self._weights(_heads(self.mixer, x), place)[0]
        if place.start == 0:
            self.first_row = weights[..., 0].clone()
        assert self.first_row is not None, "token 0 comes first"
        return torch.einsum("hm,hmt->ht", self.first_row, weights)


class GatheredAgents(_Represented):
    """Agent attention: agents, what they collect, and a softmax over them."""

    mixer: AgentAttention

    def update(self, x: Tensor, place: slice) -> Tensor:
        """Collect from the agents."""
        heads = _heads(self.mixer, x)
        dtype = heads.queries.dtype
        agents, collected = self.saved["representatives"].to(dtype), self.saved["picked"].to(dtype)
        return self.mixer.project_out(ops.softmax_attention(heads.queries, agents, collected), heads)

    def map_row(self, x: Tensor, place: slice) -> Tensor:
        """Of the product of both softmaxes."""
        heads = _heads(self.mixer, x)
        if place.start == 0:
            query = _wide(heads.queries[0, :, 0])  # (H, P)
            logits = self.scale * torch.einsum("hp,hmp->hm", query, self._first_guess(heads)[0])
            self.first_row = logits.softmax(-1)
        assert self.first_row is not None, "token 0 comes first"
        return torch.einsum("hm,hmt->ht", self.first_row, self._attention(heads)[0])


class GatheredLinearCBSA(Gathered):
    """LinearCBSA: the Gram matrices of the heads, then a filter."""

    def __init__(self, mixer: LinearCBSA, length: int, place: Place, num_prefix_tokens: int) -> None:
        super().__init__(mixer, length, place, num_prefix_tokens)
        self.mixer = mixer

    def _tokens(self, x: Tensor) -> tuple[Heads, Tensor]:
        heads = _heads(self.mixer, x)
        return heads, heads.queries.to(solve_dtype(heads.queries))

    def add(self, x: Tensor, place: slice) -> None:
        """Sum the outer products."""
        _, w = self._tokens(x)
        self._sum("gram", w.mT @ w / self.mixer.eps**2)

    def _filter(self) -> Tensor:
        total = self.saved["gram"]
        return spectral_filter(total / self.length if self.mixer.average else total, self.mixer.solver)

    def update(self, x: Tensor, place: slice) -> Tensor:
        """Filter."""
        heads, w = self._tokens(x)
        out = (w @ self._filter()).to(heads.queries.dtype)
        return self.mixer.project_out(self.mixer.step_tokens[:, None, None].to(out.dtype) * out, heads)

    def map_row(self, x: Tensor, place: slice) -> Tensor:
        """Of W (eps^2 I + W^T W)^-1 W^T."""
        _, w = self._tokens(x)
        if place.start == 0:
            norm = self.mixer.eps**2 * (self.length if self.mixer.average else 1)
            self.first_row = (self._filter() @ w[:, :, 0, :, None] / norm)[0]  # (H, P, 1)
        assert self.first_row is not None, "token 0 comes first"
        return (w[0] @ self.first_row)[..., 0]

    @property
    def numbers_per_token(self) -> int:
        """Tokens in float64, before and after the filter."""
        return 5 * self.mixer.num_heads * self.mixer.head_dim


class GatheredTSSA(Gathered):
    """TSSA: second moments of channels; as ToST trains it, weighted by memberships, which need a sum first."""

    def __init__(self, mixer: TSSA, length: int, place: Place, num_prefix_tokens: int) -> None:
        super().__init__(mixer, length, place, num_prefix_tokens)
        self.mixer = mixer
        self.gathers = 2 if mixer.form == "tost" else 1

    def _membership(self, squares: Tensor) -> Tensor:
        assert self.mixer.temperature is not None, "of form='tost'"
        return memberships(squares, self.saved["squares"].to(squares.dtype), self.mixer.temperature)

    def add(self, x: Tensor, place: slice) -> None:
        """Sum the squares, then the memberships and the squares weighted by them."""
        w = _wide(_heads(self.mixer, x).queries)
        if self.mixer.form == "channel":
            self._sum("squares", (w / self.mixer.eps).square().sum(-2, keepdim=True))
        elif "finished" not in self.saved:
            self._sum("squares", w.square().sum(-2, keepdim=True))
        else:
            squares = w.square()
            membership = self._membership(squares)
            self._sum("members", membership.sum(-1))
            self._sum("moments", membership[..., None, :] @ squares)

    def finish(self) -> None:
        """Note that the squares are summed up."""
        self.saved["finished"] = torch.ones(1)

    def update(self, x: Tensor, place: slice) -> Tensor:
        """Damp the channels."""
        heads = _heads(self.mixer, x)
        w = _wide(heads.queries)
        if self.mixer.step_tokens is not None:
            energy = self.saved["squares"] / (self.length if self.mixer.average else 1)
            out = (w / (1 + energy.to(w.dtype))).to(heads.queries.dtype)
            out = self.mixer.step_tokens[:, None, None].to(out.dtype) * out
        else:
            moment = self.saved["moments"] / (self.saved["members"] + MEMBERSHIP_FLOOR)[..., None, None]
            membership = self._membership(w.square())[..., None]
            out = (-w * membership / (1 + moment.to(w.dtype))).to(heads.queries.dtype)
        return self.mixer.project_out(out, heads)

    def map_row(self, x: Tensor, place: slice) -> Tensor:
        """As for LinearCBSA with only the diagonal; of ``"tost"`` the product of memberships."""
        w = _wide(_heads(self.mixer, x).queries)[0]
        if self.mixer.temperature is None:
            count = self.length if self.mixer.average else 1
            if place.start == 0:
                energy = 1 + self.saved["squares"][0, :, 0] / count
                self.first_row = w[:, 0] / (self.mixer.eps**2 * count * energy).to(w.dtype)
            assert self.first_row is not None, "token 0 comes first"
            return torch.einsum("htp,hp->ht", w, self.first_row)
        membership = self._membership(w.square()[None])[0]
        if place.start == 0:
            total = (self.saved["members"][0] + MEMBERSHIP_FLOOR).to(w.dtype)
            self.first_row = (membership[:, 0] / total)[:, None]
        assert self.first_row is not None, "token 0 comes first"
        return self.first_row * membership


_GATHERED: dict[type[nn.Module], type[Gathered]] = {
    CBSA: GatheredCBSA,
    AgentAttention: GatheredAgents,
    LinearCBSA: GatheredLinearCBSA,
    TSSA: GatheredTSSA,
}
_ALL_AT_ONCE = (MSSA, MHSA)


def gathered(name: str, mixer: nn.Module, length: int, place: Place, num_prefix_tokens: int) -> Gathered:
    """What ``mixer``, called ``name`` in the model, gathers.

    Raises:
        ValueError: a mixer that cannot be streamed, or one with hooks, which would be passed by.
    """
    kind = type(mixer)
    if kind in _ALL_AT_ONCE:
        raise ValueError(
            f"{name} is {kind.__name__}, which compares every token with every other and needs all at once; "
            "CBSA, AgentAttention, LinearCBSA and TSSA can be streamed"
        )
    if kind not in _GATHERED:
        known = ", ".join(known.__name__ for known in _GATHERED)
        raise ValueError(f"{name} is {kind.__name__}, which cannot be streamed; these can: {known}")
    for part in (mixer, getattr(mixer, "representatives", None)):
        change = "" if part is None else call_changes(part)
        if change:
            raise ValueError(
                f"{name} cannot be streamed: of {type(part).__name__} {change}, which would not act; remove it"
            )
    try:
        return _GATHERED[kind](mixer, length, place, num_prefix_tokens)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
