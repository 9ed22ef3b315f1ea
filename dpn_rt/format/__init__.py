"""What an engine directory is: configuration, weights, manifest."""
