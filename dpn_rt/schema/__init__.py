"""What every package may use: bounded JSON, files, texts and processes, and names, shapes and dtypes of weights."""
