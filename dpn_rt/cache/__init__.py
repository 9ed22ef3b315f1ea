"""What is kept between steps: keys and values in KV blocks, and image embeddings."""
