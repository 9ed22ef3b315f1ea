"""Stages as TensorRT-LLM engines (1.0 to 1.2): the API that is used, and a stage's inputs in each phase.

This has not been run with the package itself yet (docs/tensorrt.md).
"""
