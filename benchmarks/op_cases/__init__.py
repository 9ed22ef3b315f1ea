"""What `ops.py` measures: each kernel beside the same work in torch."""
