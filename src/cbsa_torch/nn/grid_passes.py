"""What is under way through a model: which image the tokens in a layer belong to, and so which grid they are.

A :class:`Pass` is one batch of images on its way. Tokens are recognised by a tag (:class:`PassTags`): hooks
tag what goes into blocks and comes out, for as long as those tensors live. Gradient checkpointing keeps the
input of a block and computes with it again, so that a recomputation finds its pass, in any thread. Tokens
without a tag are of the block that is running, or else of an image that this thread has embedded and that has
not come this far (:class:`ThreadState`).
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, defaultdict

from torch import Tensor
from torch.fx import Proxy

from cbsa_torch._core.types import GridSize
from cbsa_torch.ops.coordinates import Coordinates


class OpenGrid:
    """A grid whose sides an export leaves open. They are expressions, with no hash: this has its own."""

    def __init__(self, sides: GridSize) -> None:
        self.sides = sides


Place = GridSize | OpenGrid | Coordinates
"""Where the tokens of images are: on a grid, or each at its coordinates (NaFlex)."""
Waiting = defaultdict[int, Counter[Place | None]]
"""What one thread has embedded: for each follower, how many images of which grid have not come to it."""


class Pass:
    """One image, or batch, on its way through a model."""

    def __init__(self, place: Place, waiting: Waiting | None) -> None:
        self.place = place
        self.waiting = waiting
        """Where it is counted; None if nothing is known of its embedding."""
        self.reached: set[int] = set()

    def reach(self, follower: int, waiting: Waiting) -> None:
        """Note that it came to a follower."""
        if self.waiting is waiting and follower not in self.reached:
            self.reached.add(follower)
            waiting[follower][self.place] -= 1
            if waiting[follower][self.place] <= 0:  # coordinates are not kept longer than they are needed
                del waiting[follower][self.place]


class Traced:
    """An image that a compiled graph embedded: its grid is an attribute that the graph writes, and may read."""

    def __init__(self, grid: GridSize | None = None, graph: int = 0, earlier: Traced | None = None) -> None:
        self.grid = grid
        self.graph = graph
        """A number for the place in the graph; 0: there is no image."""
        self.earlier = earlier
        """The image before, if it is in the same graph, or was embedded in one that does not encode it."""

    def images(self) -> list[Traced]:
        """Return the image and those before."""
        found: list[Traced] = []
        image: Traced | None = self
        while image is not None and image.graph:
            found.append(image)
            image = image.earlier
        return found


class ThreadState:
    """What is under way in one thread. Compiled code reads, writes and guards ``traced``."""

    def __init__(self) -> None:
        self.waiting: Waiting = defaultdict(Counter)
        self.blocks: list[tuple[object, Pass | None]] = []
        """Those that are running, from the outside in, and the pass in each."""
        self.traced = Traced()
        self.in_fx: Proxy | None = None
        """The grid in the FX graph that was traced last."""

    @property
    def running(self) -> Pass | None:
        """The pass in the innermost block."""
        return self.blocks[-1][1] if self.blocks else None


class PerThread(threading.local):
    """A state for each thread. A copy starts anew."""

    def __init__(self) -> None:
        self.state = ThreadState()
        self.graph = 0
        """The number given last while Dynamo traced in this thread."""

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return PerThread, ()


class _Tag(weakref.ref[Tensor]):
    """A tensor, and the pass that it belongs to."""

    __slots__ = ("address", "found", "version")
    address: int
    version: int
    found: Pass


class PassTags:
    """The passes of tensors, by where their values are: a detached tensor belongs to the pass of the original.

    A tag holds while the tensor that it was put on lives and nothing is written into it. A copy starts anew.
    """

    def __init__(self) -> None:
        self._by_address: dict[int, _Tag] = {}

    def __reduce__(self) -> tuple[type[PassTags], tuple[()]]:
        return PassTags, ()

    def __len__(self) -> int:
        return len(self._by_address)

    def get(self, x: Tensor) -> Pass | None:
        """The pass of ``x``, if it is known."""
        tag = self._by_address.get(_address(x))
        tensor = None if tag is None else tag()
        if tag is None or tensor is None or tag.version != _version(x):
            return None
        return tag.found if tensor.shape == x.shape and tensor.stride() == x.stride() else None

    def put(self, x: Tensor, found: Pass, *, is_new: bool = False) -> None:
        """Tag ``x``, where that is possible.

        ``is_new``: a block has just made it. Other inference tensors are not tagged, since nothing tells
        whether they are written into.
        """
        address = _address(x)
        if address and (is_new or not x.is_inference()):
            tag = _Tag(x, self._drop)
            tag.address, tag.version, tag.found = address, _version(x), found
            self._by_address[address] = tag

    def _drop(self, tag: _Tag) -> None:
        if self._by_address.get(tag.address) is tag:
            del self._by_address[tag.address]


def _version(x: Tensor) -> int:
    """How often ``x`` was written into; inference tensors do not count it."""
    return 0 if x.is_inference() else x._version


def _address(x: Tensor) -> int:
    """Where the values are; 0 where nothing lasting tells (fake tensors, transforms)."""
    if type(x) is not Tensor:
        return 0
    try:
        return x.data_ptr()
    except RuntimeError:  # inside torch.func
        return 0
