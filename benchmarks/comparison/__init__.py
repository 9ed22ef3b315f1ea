"""What `latency.py` compares: subjects on the same requests, round by round, and their report."""
