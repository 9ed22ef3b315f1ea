"""A small DPN trained on drawn scenes: data, recipe, checkpoint and evaluation."""
