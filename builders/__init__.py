"""Checkpoints to engines: one module per kind of engine, and the readers of published layouts that they share."""
