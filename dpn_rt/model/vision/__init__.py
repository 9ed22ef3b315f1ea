"""Vision encoders, one module each: images to decoder rows."""
