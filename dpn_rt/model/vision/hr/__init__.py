"""LLaVA-HR's vision tower: a ConvNeXt at high resolution that is mixed into a CLIP ViT."""
