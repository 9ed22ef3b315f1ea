"""The commands of `python -m dpn_rt.evaluate`: their options, and what they print."""
