"""The arithmetic at the bottom of the house, one verb a file, on plain tensors."""
