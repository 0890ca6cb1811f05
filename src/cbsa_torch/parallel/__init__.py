"""Context parallel: the tokens of one image or set spread over processes, exactly.

All that couples tokens in a linear mixer is a state of a size that does not grow with their number. So
processes share the tokens, and exchange that state, two or three times per layer.
"""

from cbsa_torch.nn.bands import ImageBand, pixel_rows
from cbsa_torch.nn.shares import ContextParallelInput, ContextParallelPlan, SetSlice
from cbsa_torch.ops.parallel import ContextParallel
from cbsa_torch.parallel.style import ContextParallelStyle, context_parallel

__all__ = [
    "ContextParallel",
    "ContextParallelInput",
    "ContextParallelPlan",
    "ContextParallelStyle",
    "ImageBand",
    "SetSlice",
    "context_parallel",
    "pixel_rows",
]
