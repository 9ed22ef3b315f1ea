"""Backends compute steps: `backend.py` is the interface; `kernels` and `tensorrt` implement it."""
