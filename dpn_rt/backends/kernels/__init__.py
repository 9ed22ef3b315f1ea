"""The backend of the product's own kernels. On a GPU, steps are recorded once as graphs and replayed."""
