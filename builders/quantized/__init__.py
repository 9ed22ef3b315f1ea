"""Quantised checkpoints: one module per format, and the checkpoint with the weights that their tensors stand for."""
