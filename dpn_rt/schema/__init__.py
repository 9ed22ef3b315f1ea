"""What configurations and weights are made of: JSON values of frozen dataclasses, shapes and dtypes of weights."""
