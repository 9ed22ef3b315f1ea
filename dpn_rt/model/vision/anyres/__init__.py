"""Images in tiles: an overview and as many tiles of a tower's own size as the image's shape asks for."""
