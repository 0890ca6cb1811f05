"""A model of sets of features as TRIDENT calls a slide encoder; TRIDENT itself is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cbsa_torch.models.token_set import TokenSetTransformer


class SlideEncoder(nn.Module):
    """One embedding per slide, with the call and the attributes of TRIDENT's slide encoders.

    Args:
        model: whose class token, before the head, is the embedding.
        enc_name: the name that TRIDENT calls the encoder by.
        precision: what TRIDENT runs the model in: float32, or another dtype for autocast.

    Examples:
        >>> from cbsa_torch.models import SlideEncoder, TokenSetTransformer
        >>> encoder = SlideEncoder(TokenSetTransformer(in_dim=1536, dim=64, depth=2, num_heads=4))
        >>> encoder({"features": torch.randn(1, 300, 1536), "coords": torch.rand(1, 300, 2)}).shape
        torch.Size([1, 64])
    """

    def __init__(
        self, model: TokenSetTransformer, enc_name: str = "cbsa", precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.model = model
        self.enc_name = enc_name
        self.precision = precision
        self.embedding_dim = model.num_features

    def forward(self, batch: Mapping[str, Any], device: torch.device | str | None = None) -> Tensor:
        """Embed one slide.

        Args:
            batch: ``features`` ``(1, N, D)`` and, unless the model needs none, ``coords`` ``(1, N, 2)``; other
                entries are not looked at: coordinates may have any unit.
            device: where the model is. Default: where the features are.

        Returns:
            ``(1, embedding_dim)``.
        """
        coords = batch.get("coords") if self.model.needs_coords else None
        features = batch["features"].to(device)
        tokens = self.model.forward_features(features, None if coords is None else coords.to(device))
        return self.model.forward_head(tokens, pre_logits=True)
