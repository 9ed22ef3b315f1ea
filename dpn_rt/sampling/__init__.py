"""Logits -> token ids: parameters, filters, sampler, log-probabilities."""
