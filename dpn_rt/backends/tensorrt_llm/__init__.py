"""Stages as TensorRT-LLM engines (1.0 to 1.2): what is asked of the package, and a stage's inputs in each phase.

Nothing here has been run with the package itself (docs/tensorrt.md).
"""
