"""How the layers of a model learn the grid of its images: from the patch embedding, which knows it.

timm hands its attention layers tokens without a grid, and a number of tokens does not tell one: 16 patches may
be 4 x 4 or 2 x 8. Every way through a model (``forward``, ``forward_features``, ``forward_intermediates``,
feature extractors) calls its patch embedding first, so a forward hook there sees the grid of every image.

From there the grid goes with the tokens, since several images may be under way at once. Hooks of the blocks
remember the grid of the tensors that go in and come out, for as long as those live (:class:`_Tags`). Gradient
checkpointing keeps a block's input and computes with it again, so a recomputation finds its grid, in any
thread. Tokens that no hook has seen belong to an image that this thread has embedded and that has not reached
this layer yet (:class:`_Ledger`). Where that leaves several grids, an error says so.

``torch.compile`` traces the embedding and the layers of a model in one graph, in which the grid is an
attribute, written and read. A block that is compiled alone leaves its graph to ask, at both of its ends.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from cbsa_torch._core.types import GridSize

EMBEDDING = "patch_embed"
"""timm's name of the patch embedding."""


class GridSource:
    """What a model's patch embedding says about the grids of its images.

    It holds what does not change from pass to pass. What is under way is in ``here``, apart for each thread,
    and in ``tags``.
    """

    def __init__(self, model: nn.Module, embedding: nn.Module) -> None:
        self.num_prefix_tokens: int | None = 0
        """None: what the grid leaves."""
        self.built_for: GridSize | None = None
        self.seen: set[GridSize] = set()
        """Every grid so far. Tokens of unknown origin can only have one of these."""
        self.sees_all = True
        """Whether ``seen`` is complete: a compiled graph embeds images of any size without adding to it."""
        self.fixed_size: bool = getattr(embedding, "strict_img_size", False)
        self.followers: list[GridFollower] = []
        self._start()
        self.handles += [
            model.register_forward_pre_hook(self.begin),
            model.register_forward_hook(self.end, always_call=True),
            embedding.register_forward_hook(self.note),
        ]

    def _start(self) -> None:
        self.here = _Here()
        self.tags = _Tags()
        self.handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("here", "tags", "handles")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def follower(self) -> GridFollower:
        """A new follower: one for each module that asks."""
        self.followers.append(GridFollower(self))
        return self.followers[-1]

    def surround(self, module: nn.Module, layers: Collection[nn.Module]) -> bool:
        """Hook what stands between a model and those ``layers`` that are in ``module``; False if none is."""
        if module in layers:
            return True
        around = [child for child in module.children() if self.surround(child, layers)]
        if around and not self._follows(module):
            follower = self.follower()
            self.handles += [
                module.register_forward_pre_hook(follower.enter, with_kwargs=True),
                module.register_forward_hook(follower.leave, always_call=True),
            ]
        if any(child in layers for child in around):
            for child in module.children():  # transformers checkpoints a layer's forward, without its hooks
                if "norm" in type(child).__name__.lower() and not self._follows(child):
                    self.handles.append(child.register_forward_hook(self.follower().carry))
        return bool(around)

    def remove(self) -> None:
        """Take all hooks away again."""
        while self.handles:
            self.handles.pop().remove()

    def begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Set aside what the thread embedded before a call of the whole model: its forward pre-hook."""
        if not torch.compiler.is_dynamo_compiling():
            state = self.here.state
            self.take_in(state)
            state.outer.append(state.ledger)
            state.ledger = _Ledger()

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Take it up again: the model's forward hook, also when it raises."""
        state = self.here.state
        if not torch.compiler.is_dynamo_compiling() and state.outer:
            state.ledger = state.outer.pop()

    def note(self, embedding: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Note the grid that ``embedding`` made of its input: its forward hook."""
        grid, state = _grid_made(embedding, inputs, output), self.here.state
        if torch.compiler.is_dynamo_compiling():
            state.before = state.latest
            state.latest = _Note(grid, self._new_graph())
            return
        self.take_in(state)
        state.stack.clear()  # of blocks that failed in compiled code
        state.grid = None
        state.ledger.embedded[grid] += 1
        self.seen.update(() if grid is None else (grid,))

    def take_in(self, state: _State) -> None:
        """Enter into the thread's ledger what compiled graphs have noted since."""
        notes = [note for note in (state.before, state.latest) if note.graph]
        if not notes:
            return
        ledger = state.ledger
        for note in notes:
            ledger.embedded[note.grid] += 1
            self.seen.update(() if note.grid is None else (note.grid,))
            ledger.taken.update((f, note.grid) for f in self.followers if note.graph in f.graphs)
        # Only two notes are kept: a graph that embeds and does not encode may have made others before.
        ledger.incomplete |= len(notes) == 2 and not any(notes[0].graph in f.graphs for f in self.followers)
        state.before, state.latest = _Note(), _Note()

    def fits(self, grid: GridSize | None, x: Tensor) -> bool:
        """Whether ``(B, N, C)`` tokens may be such a grid, and the prefix tokens before it."""
        if grid is None:
            return False
        extra = x.shape[1] - math.prod(grid)
        return extra >= 0 if self.num_prefix_tokens is None else extra == self.num_prefix_tokens

    def only_grid(self, x: Tensor) -> GridSize | None:
        """The one grid that tokens of unknown origin may have, or None if they may have several."""
        if not self.sees_all:
            return None
        seen: list[GridSize | None] = [grid for grid in self.seen if self.fits(grid, x)]
        only = self.built_for if not seen else seen[0] if len(seen) == 1 else None
        return only if self.fits(only, x) else None

    def graph_before(self) -> int:
        """While Dynamo traces: the graph noted last before. It simulates what it traces, and runs this."""
        return self.here.state.latest.graph

    def _new_graph(self) -> int:
        """While Dynamo traces: a number for the graph; a constant in it."""
        self.sees_all &= self.fixed_size
        self.here.tracing = next(_graph_numbers)
        return self.here.tracing

    # What torch.compiler.assume_constant_result does, but that would import the compiler (a second).
    graph_before._dynamo_marked_constant = True  # type: ignore[attr-defined]
    _new_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _follows(self, module: nn.Module) -> bool:
        hooks = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
        return any(isinstance(owner, GridFollower) and owner.source is self for owner in hooks)


class GridFollower:
    """One module of a model that takes its grid from a source: a layer, or what stands around or before it."""

    def __init__(self, source: GridSource) -> None:
        self.source = source
        self.graphs: set[int] = set()
        """The compiled graphs that contain both the embedding and this module."""

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "graphs": set()}

    def grid_of(self, x: Tensor) -> GridSize:
        """The grid behind ``(B, N, C)`` tokens, those that the layer is called with.

        Raises:
            ValueError: no image had as many patches: some were dropped, say.
            RuntimeError: images of several grids had, and nothing tells whose tokens these are.
        """
        if not torch.compiler.is_dynamo_compiling():
            return self._grid_of(x)
        state = self.source.here.state
        if self._in_graph():
            if not self.source.fits(state.latest.grid, x):
                raise ValueError(self._misfit(x.shape[1], [state.latest.grid]))
            return cast(GridSize, state.latest.grid)
        if self.source.fits(state.grid, x):
            return cast(GridSize, state.grid)
        return torch.compiler.disable(self._grid_of)(x)

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the grid of a block's input, for what is inside: its forward pre-hook."""
        self._outside_graphs(block, self._enter, args, kwargs)

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hand the grid on with a block's output: its forward hook, also when the block raises."""
        self._outside_graphs(block, self._leave, output)

    def carry(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hand the grid on, where no block around does it: a forward hook of norms."""
        if self.source.here.state.grid is None:
            self._outside_graphs(None, self._carry, args, output)

    def _outside_graphs(self, block: nn.Module | None, method: Callable[..., None], *args: Any) -> None:
        """Call ``method``, but not where the grid goes through the graph that Dynamo traces, or nobody asks."""
        if not torch.compiler.is_dynamo_compiling():
            method(*args)
        elif not self._in_graph() and (block is None or any(_asks(module) for module in block.modules())):
            torch.compiler.disable(method)(*args)

    def _in_graph(self) -> bool:
        """While Dynamo traces: whether the embedding is in the same graph."""
        if self.source.here.state.latest.graph == self.source.graph_before():
            return False
        self._join_graph()
        return True

    def _join_graph(self) -> None:
        self.graphs.add(self.source.here.tracing)

    _join_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _grid_of(self, x: Tensor) -> GridSize:
        state = self.source.here.state
        found = self._find(state, x)
        if found is None:
            raise self._unknown(state, x)
        return found.grid

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.source.here.state
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim == 3), None)
        found = None if x is None else self._find(state, x)
        if found is None and state.stack:
            found = state.stack[-1][1]
        state.stack.append((self, found))
        state.grid = None if found is None else found.grid

    def _leave(self, output: Any) -> None:
        state = self.source.here.state
        if not any(block is self for block, _ in state.stack):  # entered in a compiled graph
            return
        found = None
        while True:
            block, found = state.stack.pop()
            if block is self:
                break
        outer = state.stack[-1][1] if state.stack else None
        state.grid = None if outer is None else outer.grid
        y = output[0] if isinstance(output, tuple) and output else output
        if found is not None and isinstance(y, Tensor) and y.ndim == 3 and self.source.fits(found.grid, y):
            self.source.tags.put(y, found)

    def _carry(self, args: tuple[Any, ...], output: Any) -> None:
        found = self.source.tags.get(args[0]) if args and isinstance(args[0], Tensor) else None
        if found is not None and isinstance(output, Tensor):
            self.source.tags.put(output, found)

    def _find(self, state: _State, x: Tensor) -> _Pass | None:
        """The pass that tokens belong to: theirs, that of the block around, or the one that can be meant."""
        tags = self.source.tags
        found = tags.get(x)
        if found is None:
            found = state.stack[-1][1] if state.stack else None
            if found is None or not self.source.fits(found.grid, x):
                found = self._awaited(state, x)
            if found is None:
                return None
            tags.put(x, found)
        if found.ledger is state.ledger and self not in found.reached:
            found.reached.add(self)
            state.ledger.taken[self, found.grid] += 1
        return found

    def _awaited(self, state: _State, x: Tensor) -> _Pass | None:
        """The pass of tokens that nobody has seen: of an image that has not come this far, or the only kind."""
        pending = self._pending(state)
        fitting = [grid for grid in pending if self.source.fits(grid, x)]
        if len(fitting) == 1 and not state.ledger.incomplete:
            return _Pass(cast(GridSize, fitting[0]), state.ledger)
        grid = None if pending else self.source.only_grid(x)
        return None if grid is None else _Pass(grid, None)

    def _pending(self, state: _State) -> list[GridSize | None]:
        """The grids of the images that this thread embedded, and that have not come this far."""
        self.source.take_in(state)
        ledger = state.ledger
        return [grid for grid, number in ledger.embedded.items() if number > ledger.taken[self, grid]]

    def _unknown(self, state: _State, x: Tensor) -> Exception:
        """What to raise for such tokens. What was embedded is given up, so that the next image goes through."""
        pending = self._pending(state)
        fitting = [grid for grid in {*pending, *self.source.seen} if self.source.fits(grid, x)]
        state.ledger = _Ledger()
        if not fitting or (pending and not any(self.source.fits(grid, x) for grid in pending)):
            return ValueError(self._misfit(x.shape[1], pending or [*self.source.seen, self.source.built_for]))
        known = ", ".join(sorted(map(str, fitting)))
        return RuntimeError(
            f"x has {x.shape[1]} tokens, and nothing tells which of the grids {known} of earlier images is "
            "theirs. Encode each image before the next is embedded, in the same thread, or tell the layer its "
            "grid (grid_size of forward, or set_input_size)"
        )

    def _misfit(self, num_tokens: int, grids: Iterable[GridSize | None]) -> str:
        known = ", ".join(str(grid) for grid in grids if grid is not None) or "unknown size"
        return (
            f"x has {num_tokens} tokens, {self.source.num_prefix_tokens or 0} of them prefix tokens, but the "
            f"model's patches make grids of {known}; pass grid_size, and drop no patches (patch_drop_rate)"
        )


class _Pass:
    """One image, or batch, on its way through a model."""

    def __init__(self, grid: GridSize, ledger: _Ledger | None) -> None:
        self.grid = grid
        self.ledger = ledger
        """Where its embedding was counted; None if nothing is known of it."""
        self.reached: set[GridFollower] = set()


class _Ledger:
    """What one thread has embedded, and which of it has reached which layer."""

    def __init__(self) -> None:
        self.embedded: Counter[GridSize | None] = Counter()
        self.taken: Counter[tuple[GridFollower, GridSize | None]] = Counter()
        self.incomplete = False
        """Whether images may be missing that a compiled embedding made."""


class _Note:
    """What a compiled graph notes of an embedding: the grid, and its own number, 0 = nothing noted."""

    def __init__(self, grid: GridSize | None = None, graph: int = 0) -> None:
        self.grid = grid
        self.graph = graph


class _State:
    """What is under way in one thread: a plain object, so that Dynamo reads, writes and guards attributes."""

    def __init__(self) -> None:
        self.latest = _Note()
        self.before = _Note()
        self.grid: GridSize | None = None
        """That of the block which is running."""
        self.stack: list[tuple[GridFollower, _Pass | None]] = []
        self.ledger = _Ledger()
        self.outer: list[_Ledger] = []
        """Those set aside during calls of the whole model."""


class _Here(threading.local):
    """A state for each thread."""

    def __init__(self) -> None:
        self.state = _State()
        self.tracing = 0
        """The graph that Dynamo traces in this thread."""


class _Tag(weakref.ref[Tensor]):
    """A tensor, and the pass that it belongs to."""

    __slots__ = ("address", "found", "version")
    address: int
    version: int
    found: _Pass


class _Tags:
    """The passes of tensors, by where their values are: a detached tensor belongs to the pass of the original.

    A tag holds while the tensor that it was put on lives and nothing is written into it.
    """

    def __init__(self) -> None:
        self._by_address: dict[int, _Tag] = {}

    def __len__(self) -> int:
        return len(self._by_address)

    def get(self, x: Tensor) -> _Pass | None:
        tag = self._by_address.get(_address(x))
        tensor = None if tag is None else tag()
        if tag is None or tensor is None or tag.version != x._version:
            return None
        return tag.found if tensor.shape == x.shape and tensor.stride() == x.stride() else None

    def put(self, x: Tensor, found: _Pass) -> None:
        address = _address(x)
        if address:
            tag = _Tag(x, self._drop)
            tag.address, tag.version, tag.found = address, x._version, found
            self._by_address[address] = tag

    def _drop(self, tag: _Tag) -> None:
        if self._by_address.get(tag.address) is tag:
            del self._by_address[tag.address]


_graph_numbers = itertools.count(1)


class _FollowsGrid(Protocol):
    grid_source: GridFollower | None


def follow_grid(
    model: nn.Module, *, embedding: nn.Module | None = None, num_prefix_tokens: int | None = None
) -> int:
    """Let the token mixers in a model take their grid from its patch embedding.

    timm's constructors with ``attn_layer=`` do this by themselves; call it after you put a layer into a model
    that is already there, or for models of another make. A grid that a layer was given (``set_input_size``)
    goes first.

    Args:
        model: what holds the layers.
        embedding: called before them, with a ``(B, C, height, width)`` output, or tokens and an attribute
            ``grid_size``, as timm's. Default: ``model.patch_embed``.
        num_prefix_tokens: class and register tokens. Default: ``model.num_prefix_tokens``, else 0.

    Returns:
        How many layers follow.

    Raises:
        ValueError: no patch embedding.
    """
    embedding = model._modules.get(EMBEDDING) if embedding is None else embedding
    if embedding is None:
        raise ValueError(
            f"model must have a {EMBEDDING}, as timm's ViTs have, got {type(model).__name__}; pass embedding, "
            "or tell layers their grid by set_input_size"
        )
    prefix = getattr(model, "num_prefix_tokens", 0) if num_prefix_tokens is None else num_prefix_tokens
    return _follow(model, embedding, prefix, model.children())


@contextmanager
def watch_grids(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[dict[nn.Module, GridFollower]]:
    """Let any layers of a model, of any class, be asked for their grids inside the context.

    Yields:
        A follower for each layer that has a ``patch_embed`` around it, or follows one already.
    """
    asked = {layer: getattr(layer, "grid_source", None) for layer in layers}
    found: dict[nn.Module, GridFollower] = {layer: own for layer, own in asked.items() if own is not None}
    sources = []
    try:
        for part in model.modules():
            embedding = part._modules.get(EMBEDDING)
            if embedding is None:
                continue
            children = list(part.children())
            inside = {m for child in children for m in _modules_of(child, embedding) if m in layers} - {*found}
            if inside:
                source = GridSource(part, embedding)
                sources.append(source)
                source.num_prefix_tokens = getattr(part, "num_prefix_tokens", None)
                source.built_for = getattr(embedding, "grid_size", None)
                for child in children:
                    source.surround(child, inside)
                found.update({layer: source.follower() for layer in inside})
        yield found
    finally:
        for source in sources:
            source.remove()


def install_grid_hook(*, after_removal: bool = True) -> None:
    """Have every mixer that timm builds into a model follow its grid (once per process).

    A layer is not told its model, but PyTorch tells of every module that becomes part of another. The first
    mixer installs the hook, unless it was removed.

    Args:
        after_removal: install it again after :func:`remove_grid_hook`.
    """
    with _lock:
        if not _installed or (after_removal and _installed[-1] is None):
            _installed.append(register_module_module_registration_hook(_on_registration))


def remove_grid_hook() -> None:
    """Remove the hook of :func:`install_grid_hook`: layers of later models need :func:`follow_grid`.

    Models that are built already go on as they are.
    """
    with _lock:
        handle = _installed[-1] if _installed else None
        if handle is not None:
            handle.remove()
        _installed[:] = [None]


_installed: list[RemovableHandle | None] = []
"""Empty before the first mixer is built; None after removal."""
_lock = threading.Lock()


def _on_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    before = module._modules.get(EMBEDDING)
    if child is None or (before is None and name != EMBEDDING):
        return
    if name != EMBEDDING:
        # Again with every part: a subclass may add prefix tokens after its blocks.
        _follow(module, cast(nn.Module, before), getattr(module, "num_prefix_tokens", 0), [child])
    elif before is None or before not in child.modules():  # not just wrapped, by torch.compile for example
        parts = [part for part in module.children() if part is not before]
        _follow(module, child, getattr(module, "num_prefix_tokens", 0), parts)


def _follow(model: nn.Module, embedding: nn.Module, num_prefix_tokens: int, parts: Iterable[nn.Module]) -> int:
    """Let the mixers in the ``parts`` of a model follow; how many there are."""
    parts = list(parts)
    mixers = {m for part in parts for m in _modules_of(part, embedding) if hasattr(m, "grid_source")}
    source = _source(embedding)
    if source is None:
        if not mixers:
            return 0
        source = GridSource(model, embedding)
    source.num_prefix_tokens = num_prefix_tokens
    source.built_for = getattr(embedding, "grid_size", None)
    for part in parts:
        source.surround(part, mixers)
    for mixer in mixers:
        current = cast(_FollowsGrid, mixer).grid_source
        if current is None or current.source is not source:
            cast(_FollowsGrid, mixer).grid_source = source.follower()
    return len(mixers)


def _modules_of(part: nn.Module, embedding: nn.Module) -> Iterator[nn.Module]:
    """The modules in a part of a model, but not those below another patch embedding than this."""
    yield part
    if part._modules.get(EMBEDDING) in (None, embedding):
        for child in part.children():
            yield from _modules_of(child, embedding)


def _source(embedding: nn.Module) -> GridSource | None:
    owners = (getattr(hook, "__self__", None) for hook in embedding._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, GridSource)), None)


def _grid_made(embedding: nn.Module, inputs: tuple[Any, ...], output: Any) -> GridSize | None:
    if isinstance(output, (tuple, list)):  # timm's PatchEmbedWithSize: tokens and their grid
        output = output[0]
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4:
        channels_last = str(getattr(embedding, "output_fmt", "NCHW")).endswith("NHWC")
        height, width = output.shape[1:3] if channels_last else output.shape[2:]
        return int(height), int(width)
    measure: Callable[..., Any] | None = getattr(embedding, "dynamic_feat_size", None)
    if measure is None or not inputs or inputs[0].ndim != 4:
        grid = getattr(embedding, "grid_size", None)
    else:
        grid = measure(tuple(inputs[0].shape[2:]))
    return None if grid is None or math.prod(grid) != output.shape[1] else (int(grid[0]), int(grid[1]))


def _asks(module: nn.Module) -> bool:
    """Whether it is a layer that needs a grid and was not given one."""
    layer: Any = module
    return hasattr(module, "grid_source") and layer.needs_grid and layer.grid_size is None


def _address(x: Tensor) -> int:
    """Where the values are; 0 where nothing lasting tells (fake tensors, transforms, no version counter)."""
    if type(x) is not Tensor or x.is_inference():
        return 0
    try:
        return x.data_ptr()
    except RuntimeError:  # inside torch.func
        return 0
