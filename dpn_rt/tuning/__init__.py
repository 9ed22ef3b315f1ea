"""Choices between CPU kernels that depend on the processor's speed, not on its instructions alone."""
