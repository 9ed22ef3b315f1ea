"""Stages as TensorRT plans: the networks, and the files that are built from them."""
