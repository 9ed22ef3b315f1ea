"""Clocks, memory, limits of the machine, samples, and files of results."""
