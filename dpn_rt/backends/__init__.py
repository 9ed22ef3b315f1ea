"""What computes a step: `backend.py` is the interface; `kernels` and `tensorrt` implement it."""
