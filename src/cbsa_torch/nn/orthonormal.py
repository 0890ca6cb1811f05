"""A linear layer whose rows stay orthonormal while it trains, whatever the optimiser does to its parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cbsa_torch.nn.fused import FusedLinear, check_fusable
from cbsa_torch.ops.definite import has_no_factorisation

_REMOVE = "torch.nn.utils.parametrize.remove_parametrizations(layer.qkv, 'weight')"


class OrthonormalRows(nn.Module):
    """The orthonormal factor Q^T of a ``(rows, columns)`` parameter V = R^T Q^T, rows <= columns.

    With the diagonal of R positive Q is a smooth function of V wherever V has full rank; of less rank the rows
    are orthonormal, too, but gradients are not finite. Steps of an optimiser, weight decay, averages of weights
    and changes of precision leave the rows orthonormal. (The Householder products of PyTorch's own
    parametrisation take many times as long backward.)
    """

    def forward(self, parameter: Tensor) -> Tensor:
        """The weight; ``ValueError`` below float32, and in an export to ONNX."""
        check_factorable(parameter)
        if has_no_factorisation():
            raise ValueError(
                "ONNX has no QR decomposition: export the model fused, "
                "timm.utils.reparameterize_model(model), where orthogonal projections are computed once"
            )
        q, r = torch.linalg.qr(parameter.mT)
        return torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -q, q).mT

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The parameter of ``weight``: itself, if its rows are orthonormal, else its factor."""
        return self(weight)


class OrthonormalLinear(nn.Linear):
    """A linear layer with orthonormal rows; ``weight`` is computed from its parameter when it is read."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        parametrize.register_parametrization(self, "weight", OrthonormalRows())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw orthonormal rows, all alike probable, and the bias of ``nn.Linear``."""
        super().reset_parameters()  # of a weight that is computed it draws a copy
        if is_orthonormal(self):  # not in the constructor of nn.Linear
            self.weight = nn.init.orthogonal_(torch.empty_like(self.weight))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse what would take the place of the computed weight, as quantisers do: ``ValueError``."""
        if name == "weight" and is_orthonormal(self):
            raise ValueError(
                "weight is computed from a parameter, and nothing else can take its place. Before it is "
                f"quantised, fuse the model (timm.utils.reparameterize_model), or {_REMOVE}"
            )
        super().register_parameter(name, param)

    @torch.no_grad()
    def fuse(self) -> FusedLinear:
        """The same layer for inference, with a weight that is not computed anew; timm's convention.

        Raises:
            ValueError: it has hooks, or its ``forward`` was replaced. TypeError: a subclass with a ``forward``
                of its own, or weights that are quantised.
        """
        check_fusable(self, nn.Linear)
        return FusedLinear(self.weight.clone(), None if self.bias is None else self.bias.clone())


def is_orthonormal(module: nn.Module) -> bool:
    """Whether the rows of a layer's weight are kept orthonormal."""
    if not parametrize.is_parametrized(module, "weight"):
        return False
    return any(isinstance(step, OrthonormalRows) for step in module.parametrizations["weight"])  # type: ignore[index]


def check_no_adapter(layer: nn.Module) -> None:
    """Raise ``ValueError`` where a layer is an adapter (LoRA) around one with orthonormal rows."""
    base = layer._modules.get("base_layer")
    if base is not None and is_orthonormal(base):
        raise ValueError(
            f"qkv has orthonormal rows (orthogonal=True), and with an adapter ({type(layer).__name__}) not; "
            "peft cannot merge it, and loses it silently. Leave qkv out of target_modules, train it whole "
            f"(modules_to_save), or give up orthonormal rows before the adapter is added: {_REMOVE}"
        )


def check_factorable(weight: Tensor) -> None:
    """Raise ``ValueError`` where QR decompositions do not exist: below full precision."""
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"orthogonal needs float32 or float64 parameters, got {weight.dtype}; use autocast")
