"""The page to try the model."""
