"""The networks: decoder stages, vision tower, and the pyramid that shortens sequences between stages."""
