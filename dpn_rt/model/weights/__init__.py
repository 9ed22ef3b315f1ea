"""The matrices of linear layers as engines store them: one module per form."""
