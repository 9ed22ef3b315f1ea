"""The runtime on a device: what differs between the host's memory and a GPU, and what is built upon that difference."""
