"""A user's file: ``scripts/release_check.py`` checks it strictly against the installed wheel, and runs it."""

import tempfile
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import cbsa_torch
from cbsa_torch import CBSA, CBSABlock, adapt_vit, interpret, ops
from cbsa_torch.models import AdaptReport, ExportReport
from cbsa_torch.nn import TokenMixer


class Block(nn.Module):
    """A residual block around a mixer."""

    def __init__(self, dim: int, mixer: type[TokenMixer] = CBSA) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = mixer(dim, num_heads=2)

    def forward(self, x: Tensor, grid_size: tuple[int, ...]) -> Tensor:
        """``(B, N, dim)`` to the same."""
        update: Tensor = self.attn(self.norm(x), grid_size=grid_size)
        return x + update


def operators() -> None:
    """Functions take tensors and return tensors or records."""
    tokens, representatives = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 4, 8)
    assert_type(ops.cbsa(tokens, representatives, impl="eager"), Tensor)
    assert_type(ops.coding_rate(tokens), Tensor)
    stages = ops.cbsa_stages(ops.cbsa_inputs(tokens, representatives))
    assert_type(stages, ops.CBSAStages)
    assert_type(cbsa_torch.__version__, str)


def layers() -> None:
    """Layers, and what is recorded of them."""
    model = Block(16, CBSA.with_options(num_representatives=4))
    with interpret.capture(model) as records:
        model(torch.randn(2, 9, 16), grid_size=(3, 3))
    assert_type(records, dict[str, interpret.LayerRecord])
    CBSABlock(16)(torch.randn(1, 16, 3, 3))


def models(folder: Path) -> None:
    """What is imported at its first use has its type, too."""
    adapted = adapt_vit(timm.create_model("vit_tiny_patch16_224", depth=1), layers="all", num_representatives=4)
    assert_type(adapted.model, nn.Module)
    assert_type(adapted.report, AdaptReport)
    report = cbsa_torch.models.export_model(adapted.model, folder / "model.pt2", in_chans=3, image_size=224)
    assert_type(report, ExportReport)


def wrong() -> None:
    """A type checker sees these mistakes: it would complain of a remark that is not needed."""
    print(cbsa_torch.modles)  # type: ignore[attr-defined]
    print(interpret.captures)  # type: ignore[attr-defined]
    ops.cbsa(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 4, 8), impl="fast")  # type: ignore[arg-type]
    CBSA("384", num_heads=6)  # type: ignore[arg-type]


if __name__ == "__main__":
    operators()
    layers()
    with tempfile.TemporaryDirectory() as folder:
        models(Path(folder))
