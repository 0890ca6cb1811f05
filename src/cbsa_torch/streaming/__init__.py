"""Trained models over images and sets that do not fit into memory: exact, in a budget of bytes."""

from cbsa_torch._core.optional import require

require("streaming")

from cbsa_torch.streaming.accepted import parse_bytes  # noqa: E402
from cbsa_torch.streaming.arrays import SlicedArray, open_array, open_features  # noqa: E402
from cbsa_torch.streaming.files import StreamError  # noqa: E402
from cbsa_torch.streaming.run import StreamResult, stream  # noqa: E402

__all__ = [
    "SlicedArray",
    "StreamError",
    "StreamResult",
    "open_array",
    "open_features",
    "parse_bytes",
    "stream",
]
