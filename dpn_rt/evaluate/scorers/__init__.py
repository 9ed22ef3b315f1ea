"""One file for each benchmark, with its published rule; `table.py` lists them."""
