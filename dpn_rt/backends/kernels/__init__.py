"""The product's own kernels on a device, as graphs that are recorded once and replayed."""
