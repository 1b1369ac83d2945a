"""The model families: how each describes its checkpoints, one file a family."""
