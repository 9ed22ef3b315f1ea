"""What is kept between steps: keys and values in paged cells, and image embeddings."""
