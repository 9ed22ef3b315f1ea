"""Vision encoders, one module or package each: images to decoder rows."""
