"""Where tensors are: what differs between the host's memory and a GPU. What computes there is in `backends`."""
