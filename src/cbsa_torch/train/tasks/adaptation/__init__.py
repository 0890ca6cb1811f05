"""Recovery of adapted ViTs: fine-tune after :func:`cbsa_torch.models.adapt_vit`, with or without a teacher."""
