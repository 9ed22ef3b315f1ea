"""Models for evaluation harnesses. Each module needs the package that it is named after."""
