"""The weights of a pretrained ViT-S/14 as a file that timm's ``vit_small_patch14_dinov2`` reads."""
