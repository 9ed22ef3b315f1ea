"""One decoder on several ranks: rank 0 schedules and computes its part, processes that it starts compute the others."""
