"""One decoder on several ranks."""
