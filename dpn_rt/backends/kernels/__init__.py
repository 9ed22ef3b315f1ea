"""The backend of the product's own kernels. Steps are recorded once as graphs and replayed."""
