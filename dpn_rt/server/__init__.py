"""The OpenAI-compatible HTTP server: `python -m dpn_rt.serve`."""
