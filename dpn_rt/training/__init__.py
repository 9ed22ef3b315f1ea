"""Training of routers, and of models with them, by the published recipe."""
