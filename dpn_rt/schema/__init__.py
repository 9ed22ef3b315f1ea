"""Frozen dataclasses as JSON values, and shapes and dtypes of weights."""
