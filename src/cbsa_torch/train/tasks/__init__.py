"""What is trained: classification, segmentation, adaptation of pretrained ViTs."""
