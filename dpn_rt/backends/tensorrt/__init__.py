"""TensorRT plans: one per stage and phase, with the product's own boundaries between them (docs/tensorrt.md)."""
