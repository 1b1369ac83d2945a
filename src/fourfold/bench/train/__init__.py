"""Training steps timed beside plain PyTorch and torchtitan on the same shapes."""
