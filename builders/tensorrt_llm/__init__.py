"""Stages for TensorRT-LLM 1.0 to 1.2: checkpoints in its format, and engines that it builds from them."""
