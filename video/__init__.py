"""Video: frames -> effective frames -> video cross-attention."""
