"""Each file here is a command that says in its `--help` what it measures, and so is `gpu_quick`.

The other folders hold what commands share: `models`, `op_cases`, `comparison`, `load`, `measuring`, and `peers` (other
engines). What they have measured is in `results`.
"""
