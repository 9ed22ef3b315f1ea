"""A request's text and images -> token ids and pixels: checks, template, tokenizer, image processor."""
