"""Prompts -> checked token ids and pixels: chat template, tokenizer, image processor."""
