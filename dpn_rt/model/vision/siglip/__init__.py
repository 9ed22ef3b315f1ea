"""SigLIP's vision tower: CLIP's layers without class row and first norm, and with a bias of the patch embedding."""
