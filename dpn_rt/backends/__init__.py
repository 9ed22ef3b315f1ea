"""Who computes a step: `backend.py` is what the engine asks, the others are answers."""
