"""Models of published sizes, and engines of them."""
