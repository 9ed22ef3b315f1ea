"""Reducers, one module each: fewer visual rows at a boundary between two stages."""
