"""What is kept between steps: keys and values in KV blocks, and the decoder rows of images."""
