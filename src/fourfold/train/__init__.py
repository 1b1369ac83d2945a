"""Training: the decoder that is served, computed with gradients."""
