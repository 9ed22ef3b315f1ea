"""CLIP's vision tower: configuration, preprocessing and forward pass."""
