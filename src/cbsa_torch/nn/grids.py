"""How the layers of a model learn the grid of its images: from the patch embedding, which knows it.

timm hands its attention layers tokens without a grid, and a number of tokens does not tell one: 16 patches may
be 4 x 4 or 2 x 8. Every way through a model (``forward``, ``forward_features``, ``forward_intermediates``,
feature extractors) calls its patch embedding first: a forward hook there sees the grid of every image
(:class:`GridSource`). A layer asks a :class:`GridFollower`, which finds the image that its tokens belong to
(:mod:`cbsa_torch.nn.grid_passes`), or raises where they may be of several.

``torch.compile`` traces the embedding and the layers of a model in one graph, where the grid is an attribute,
written and read. A block that is compiled alone breaks the graph before and after the block to look the grid
up.

A NaFlexVit of timm takes images of many sizes in one padded batch, each patch at its ``patch_coord``: these are
noted in place of a grid.

One case is not seen: tokens of an image embedded earlier, or in another thread, that are encoded when this
thread has embedded one more image with as many patches, outside a call of the whole model, and not encoded it
yet. They are taken for that image.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from cbsa_torch._core.compiler import called_while_tracing
from cbsa_torch._core.tracing import is_open
from cbsa_torch._core.types import GridSize
from cbsa_torch.nn.embeddings import EMBEDDING, embedding_of, grid_made_by, pin_images
from cbsa_torch.nn.grid_passes import OpenGrid, Pass, PassTags, PerThread, Place, ThreadState, Traced
from cbsa_torch.ops.coordinates import Coordinates


class GridSource:
    """The hooks of a model and its patch embedding: it notes the grid of every image that is embedded."""

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module,
        num_prefix_tokens: int | None,
        cell: tuple[int, int] = (1, 1),
    ) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        """None: what the grid leaves."""
        self.cell = cell
        """Positions of the embedding's output for each cell of the grid, which is rounded up."""
        self.embedding: weakref.ref[nn.Module] | None = weakref.ref(embedding)
        """None for a copy, until its own embedding is called."""
        self.fixed_size: bool = getattr(embedding, "strict_img_size", False)
        self.seen: set[GridSize | None] = set()
        """Every grid so far, None for those that were not noted."""
        self.followers: list[GridFollower] = []
        self.graphs: defaultdict[int, set[int]] = defaultdict(set)
        """The followers in each compiled graph that embeds."""
        self.threads = PerThread()
        self.tags = PassTags()
        self.handles = [
            model.register_forward_pre_hook(self.start_afresh),
            model.register_forward_hook(self.start_afresh, always_call=True),
            embedding.register_forward_pre_hook(pin_images),
            embedding.register_forward_hook(self.note, with_kwargs=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A copy may be of a few blocks, without the embedding: it knows nothing until its embedding is called.
        return {**vars(self), "graphs": defaultdict(set), "handles": [], "seen": set(), "embedding": None}

    @property
    def built_for(self) -> GridSize | None:
        """The grid of the images that the model is set up for; None if nothing tells."""
        embedding = None if self.embedding is None else self.embedding()
        return getattr(embedding, "grid_size", None)

    def follower(self) -> GridFollower:
        """A new follower: one for each module that asks."""
        self.followers.append(GridFollower(self, len(self.followers)))
        return self.followers[-1]

    def surround(self, module: nn.Module, layers: Collection[nn.Module]) -> bool:
        """Hook what stands between a model and those ``layers`` that are in ``module``; False if none is."""
        if module in layers:
            return True
        around = [child for child in module.children() if self.surround(child, layers)]
        blocks = [module] if around else []
        if around and type(module).__module__.startswith("transformers."):
            # It checkpoints a layer's forward, without the layer's hooks: there the norm knows the tokens.
            blocks += [child for child in module.children() if "norm" in type(child).__name__.lower()]
        for block in blocks:
            if not any(f.source is self for f in _owners(block, GridFollower)):
                follower = self.follower()
                self.handles += [
                    block.register_forward_pre_hook(follower.enter, with_kwargs=True),
                    block.register_forward_hook(follower.leave, always_call=True),
                ]
        return bool(around)

    def lead(self, parts: Iterable[nn.Module], mixers: set[Any]) -> None:
        """Let the ``mixers`` in ``parts`` of the model follow."""
        for part in parts:
            self.surround(part, mixers)
        for mixer in mixers:
            if mixer.grid_follower is None or mixer.grid_follower.source is not self:
                mixer.grid_follower = self.follower()

    def remove(self) -> None:
        """Take all hooks away again."""
        while self.handles:
            self.handles.pop().remove()

    def start_afresh(self, *_: Any) -> None:
        """Forget what was embedded and not encoded, before and after each call of the whole model: its hook."""
        state = self.threads.state
        state.traced = Traced()
        if not torch.compiler.is_dynamo_compiling():
            state.waiting = defaultdict(Counter)

    def note(self, embedding: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note the grid that ``embedding`` made of its input, or its coordinates: its forward hook."""
        coords = kwargs.get("patch_coord")
        if coords is not None:  # of each batch others, which are no constants of a graph
            torch.compiler.disable(self._note)(embedding, Coordinates(coords))
            return
        first = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(first, Proxy):
            self.threads.state.in_fx = self._grid_in_fx(embedding, inputs, output, first.tracer)
            return
        grid, state = self._in_cells(grid_made_by(embedding, inputs, output)), self.threads.state
        if torch.compiler.is_dynamo_compiling():
            fresh = state.traced.graph != self.graph_before()
            earlier = state.traced if fresh or self._is_waiting() else None
            state.traced = Traced(grid, self._new_graph(), earlier)
            return
        self._note(embedding, OpenGrid(grid) if grid is not None and is_open(*grid) else grid)

    def _grid_in_fx(self, embedding: nn.Module, inputs: tuple[Any, ...], output: Any, tracer: Any) -> Proxy:
        """A call in an FX graph that gives the grid when the graph runs."""
        in_cells = self._in_cells

        def grid_made(inputs: tuple[Any, ...], output: Any) -> GridSize:
            grid = in_cells(grid_made_by(embedding, inputs, output))
            if grid is None:
                raise ValueError(f"{type(embedding).__name__} does not tell the grid that layers need")
            return grid

        made: Proxy = tracer.create_proxy("call_function", grid_made, (tuple(inputs), output), {})
        return made

    def _in_cells(self, made: GridSize | None) -> GridSize | None:
        if made is None or self.cell == (1, 1):
            return made
        # of positive numbers: ONNX rounds quotients of negative ones up
        rows, columns = ((side + step - 1) // step for side, step in zip(made, self.cell, strict=True))
        return rows, columns

    def _note(self, embedding: nn.Module, place: Place | None) -> None:
        state = self.threads.state
        self.embedding = weakref.ref(embedding)
        self.settle(state)
        state.blocks.clear()  # those that failed in compiled code
        self._expect(state, place)

    def settle(self, state: ThreadState) -> None:
        """Count what compiled graphs have embedded since among the images that are waited for."""
        for image in state.traced.images():
            self._expect(state, image.grid, self.graphs[image.graph])
        state.traced = Traced()

    def _expect(self, state: ThreadState, place: Place | None, reached: Collection[int] = ()) -> None:
        """Count an image among those that all followers wait for, but for those it has ``reached``."""
        if not isinstance(place, OpenGrid):  # of a program, not of an image
            self.seen.add(None if isinstance(place, Coordinates) else place)
        for follower in range(len(self.followers)):
            if follower not in reached:
                state.waiting[follower][place] += 1

    def fits(self, place: Place | None, x: Tensor) -> bool:
        """Whether ``(B, N, C)`` tokens may be there, and the prefix tokens before them."""
        if place is None:
            return False
        if isinstance(place, Coordinates):
            if place.coords.shape[0] != x.shape[0]:
                return False
            extra = x.shape[1] - place.coords.shape[1]
        else:
            extra = x.shape[1] - math.prod(place.sides if isinstance(place, OpenGrid) else place)
            if is_open(extra):
                return False
        return extra >= 0 if self.num_prefix_tokens is None else extra == self.num_prefix_tokens

    def only_grid(self, x: Tensor) -> GridSize | None:
        """The one grid that tokens of unknown origin may have, or None if they may have several."""
        fitting = {grid for grid in self.seen if self.fits(grid, x)} or {self.built_for}
        grid = fitting.pop()
        return grid if not fitting and None not in self.seen and self.fits(grid, x) else None

    # While Dynamo traces: it simulates what it traces, but it calls these, and what they return is constant.

    @called_while_tracing
    def graph_before(self) -> int:
        """The number of the graph that embedded before this trace."""
        return self.threads.state.traced.graph

    @called_while_tracing
    def _is_waiting(self) -> bool:
        """Whether what it embedded was not encoded in it."""
        graph = self.graph_before()
        return graph > 0 and not self.graphs[graph]

    @called_while_tracing
    def _new_graph(self) -> int:
        """A number for an embedding in a graph."""
        if not self.fixed_size:
            self.seen.add(None)
        self.threads.graph = next(_graph_numbers)
        return self.threads.graph

    @called_while_tracing
    def join_graph(self, follower: int) -> None:
        """Note that a follower is in the graph, after the embedding."""
        self.graphs[self.threads.graph].add(follower)


class GridFollower:
    """One module that takes its grid from a source: a layer asks for it, a block around layers hands it on."""

    def __init__(self, source: GridSource, number: int) -> None:
        self.source = source
        self.number = number

    def grid_of(self, x: Tensor) -> GridSize:
        """The grid behind ``(B, N, C)`` tokens, those that the layer is called with.

        Raises:
            ValueError: as :meth:`place_of`, or the tokens have coordinates.
        """
        place = self.place_of(x)
        if isinstance(place, Coordinates):
            raise ValueError("x has tokens at coordinates (patch_coord), where a grid is needed: pass images")
        return place

    def place_of(self, x: Tensor) -> GridSize | Coordinates:
        """The grid or coordinates of ``(B, N, C)`` tokens, those that the layer is called with.

        Raises:
            ValueError: nothing tells it. No image had as many patches (some were dropped, say), or images of
                several grids had, and these tokens may be of any.
        """
        if not torch.compiler.is_dynamo_compiling():
            return self._look_up(x)
        if self._is_in_graph():
            note = self.source.threads.state.traced
            others = [image for image in note.images() if image.grid != note.grid]
            if not any(self.source.fits(image.grid, x) for image in others):
                if note.grid is None or not self.source.fits(note.grid, x):
                    raise self._unknown(x, [note.grid])
                return note.grid
        return torch.compiler.disable(self._look_up)(x)

    def grid_in_fx(self, tracer: Tracer) -> Proxy:
        """The grid of the images in the FX graph that is traced.

        Raises:
            ValueError: the graph embeds none.
        """
        grid = self.source.threads.state.in_fx
        if grid is None or grid.tracer is not tracer:
            raise ValueError(
                "FX must trace the whole model, whose patch embedding tells the grid that a layer needs; or "
                "tell the layer its grid (set_input_size)"
            )
        return grid

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the grid of a block's input, for what is inside: its forward pre-hook."""
        self._outside_graphs(block, self._enter, args, kwargs)

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hand the grid on with a block's output: its forward hook, also when the block raises."""
        self._outside_graphs(block, self._leave, output)

    def _outside_graphs(self, block: nn.Module, method: Callable[..., None], *args: Any) -> None:
        """Call ``method``, but not where the grid goes through the graph that Dynamo traces, or nobody asks."""
        if not torch.compiler.is_dynamo_compiling():
            method(*args)
        elif not self._is_in_graph() and any(_asks(module) for module in block.modules()):
            torch.compiler.disable(method)(*args)

    def _is_in_graph(self) -> bool:
        """While Dynamo traces: whether the image was embedded in the same graph."""
        if self.source.threads.state.traced.graph == self.source.graph_before():
            return False
        self.source.join_graph(self.number)
        return True

    def _look_up(self, x: Tensor) -> GridSize | Coordinates:
        state = self.source.threads.state
        found = self._find(state, x)
        if found is None:
            awaited = self._awaited(state)
            state.waiting = defaultdict(Counter)  # so that the next image goes through
            raise self._unknown(x, {*awaited, *self.source.seen} or {self.source.built_for})
        return found.place.sides if isinstance(found.place, OpenGrid) else found.place

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.source.threads.state
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim == 3), None)
        found = None if x is None else self._find(state, x)
        state.blocks.append((self, found or state.running))

    def _leave(self, output: Any) -> None:
        state = self.source.threads.state
        depth = next((i for i, (block, _) in enumerate(state.blocks) if block is self), None)
        if depth is None:  # entered in a compiled graph
            return
        found = state.blocks[depth][1]
        del state.blocks[depth:]
        y = output[0] if isinstance(output, tuple) and output else output
        if found is not None and isinstance(y, Tensor) and y.ndim == 3 and self.source.fits(found.place, y):
            self.source.tags.put(y, found, is_new=True)

    def _find(self, state: ThreadState, x: Tensor) -> Pass | None:
        """The pass that tokens belong to: theirs, that of the block around, or the one that can be meant."""
        found = self.source.tags.get(x)
        if found is None:
            found = state.running
            if found is None or not self.source.fits(found.place, x):
                found = self._await(state, x)
            if found is None:
                return None
            self.source.tags.put(x, found)
        found.reach(self.number, state.waiting)
        return found

    def _await(self, state: ThreadState, x: Tensor) -> Pass | None:
        """The pass of tokens that nobody has seen: of an image that has not come this far, or the only kind."""
        self.source.settle(state)
        awaited = self._awaited(state)
        fitting = [grid for grid in awaited if grid is not None and self.source.fits(grid, x)]
        if len(fitting) == 1:
            return Pass(fitting[0], state.waiting)
        grid = None if awaited else self.source.only_grid(x)
        return None if grid is None else Pass(grid, None)

    def _awaited(self, state: ThreadState) -> list[Place | None]:
        """The grids of the images that this thread embedded, and that have not come this far."""
        return [grid for grid, number in state.waiting[self.number].items() if number > 0]

    def _unknown(self, x: Tensor, places: Iterable[Place | None]) -> ValueError:
        known = ", ".join(sorted(str(place) for place in places if isinstance(place, tuple))) or "unknown size"
        return ValueError(
            f"x has {x.shape[1]} tokens, {self.source.num_prefix_tokens or 0} of them prefix tokens, and "
            f"nothing tells their grid: the model's images had grids of {known}. Drop no patches "
            "(patch_drop_rate), encode each image before the next is embedded, in the same thread, or tell the "
            "layer its grid (grid_size of forward, or set_input_size)"
        )


_graph_numbers = itertools.count(1)


def follow_grid(
    model: nn.Module, *, embedding: nn.Module | None = None, num_prefix_tokens: int | None = None
) -> int:
    """Let the token mixers in a model take their grid from its patch embedding.

    timm's constructors with ``attn_layer=`` do this by themselves; call it after you put a layer into a model
    that is already there (until then it raises, if it replaced another), for models of another make, and
    without the hook of :func:`install_grid_hook`. A grid that a layer was given (``set_input_size``) goes
    first.

    Args:
        model: what holds the layers.
        embedding: called before them, with a ``(B, C, height, width)`` output, or tokens and an attribute
            ``grid_size``, as timm's. Default: ``model.patch_embed``, or ``embeds`` of a NaFlexVit. That model
            then makes masks of keys only (``use_key_only_attn_mask``), the same for all real tokens.
        num_prefix_tokens: class and register tokens. Default: ``model.num_prefix_tokens``, else 0.

    Returns:
        How many layers follow.

    Raises:
        ValueError: no patch embedding.

    Examples:
        >>> import timm
        >>> from cbsa_torch import CBSA
        >>> from cbsa_torch.nn import follow_grid
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2, dynamic_img_size=True)
        >>> for block in vit.blocks:
        ...     block.attn = CBSA(192, 3)
        >>> follow_grid(vit)
        2
        >>> vit(torch.randn(1, 3, 96, 160)).shape
        torch.Size([1, 1000])
    """
    embedding = embedding_of(model) if embedding is None else embedding
    if embedding is None:
        raise ValueError(
            f"model must have a {EMBEDDING}, as timm's ViTs have, got {type(model).__name__}; pass embedding, "
            "or tell layers their grid by set_input_size"
        )
    return follow(model, embedding, model.children(), num_prefix_tokens)


@contextmanager
def watch_grids(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[dict[nn.Module, GridFollower]]:
    """Let any layers of a model, of any class, be asked for their grids inside the context.

    Yields:
        A follower for each layer that has a ``patch_embed`` around it, or follows one already.
    """
    asked = {layer: getattr(layer, "grid_follower", None) for layer in layers}
    found: dict[nn.Module, GridFollower] = {layer: own for layer, own in asked.items() if own is not None}
    sources = []
    try:
        for part in model.modules():
            embedding = embedding_of(part)
            if embedding is None:
                continue
            inside = {m for m in modules_inside(part.children(), embedding) if m in layers and m not in found}
            if inside:
                sources.append(GridSource(part, embedding, getattr(part, "num_prefix_tokens", None)))
                for child in part.children():
                    sources[-1].surround(child, inside)
                found |= {layer: sources[-1].follower() for layer in inside}
        yield found
    finally:
        for source in sources:
            source.remove()


def lead_layers(
    model: nn.Module, embedding: nn.Module, layers: Collection[nn.Module], num_prefix_tokens: int
) -> dict[nn.Module, GridFollower]:
    """A follower for each of the ``layers`` of a model, which may be of any class; for good."""
    source = next(iter(_owners(embedding, GridSource)), None)
    if source is None:
        source = GridSource(model, embedding, num_prefix_tokens)
    for child in model.children():
        source.surround(child, layers)
    followers = {layer: source.follower() for layer in layers}
    for layer, follower in followers.items():  # what it computes from its tokens is looked up by these
        layer.register_forward_pre_hook(follower.enter, with_kwargs=True)
        layer.register_forward_hook(follower.leave, always_call=True)
    return followers


def follow(
    model: nn.Module,
    embedding: nn.Module,
    parts: Iterable[nn.Module],
    num_prefix_tokens: int | None = None,
    *,
    cell: tuple[int, int] = (1, 1),
) -> int:
    """Let the mixers in the ``parts`` of a model follow; how many there are."""
    parts = list(parts)
    mixers: set[Any] = {m for m in modules_inside(parts, embedding) if hasattr(m, "grid_follower")}
    if num_prefix_tokens is None:
        num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
    source = next(iter(_owners(embedding, GridSource)), None)
    if source is None:
        if not mixers:
            return 0
        source = GridSource(model, embedding, num_prefix_tokens, cell)
    source.num_prefix_tokens = num_prefix_tokens
    if mixers and hasattr(model, "use_key_only_attn_mask"):
        model.use_key_only_attn_mask = True  # type: ignore[assignment]
    source.lead(parts, mixers)
    return len(mixers)


def modules_inside(parts: Iterable[nn.Module], embedding: nn.Module | None = None) -> Iterator[nn.Module]:
    """The modules in parts of a model, but not those inside models with another patch embedding than this."""
    for part in parts:
        yield part
        if embedding_of(part) in (None, embedding):
            yield from modules_inside(part.children(), embedding)


def _owners(module: nn.Module, kind: type) -> list[Any]:
    """The objects of this kind whose methods are forward hooks of a module."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    return [owner for owner in owners if isinstance(owner, kind)]


def _asks(module: nn.Module) -> bool:
    """Whether it is a layer that needs a grid and was not given one."""
    layer: Any = module
    return hasattr(module, "grid_follower") and layer.needs_grid and layer.grid_size is None
