"""Continuous batching: requests in, steps, outputs out."""
