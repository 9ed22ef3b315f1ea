"""Memory, transfers and graphs of the host and of a GPU, with one interface. `backends` computes on them."""
