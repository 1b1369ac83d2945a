"""`fourfold calibrate`: the quadrants' cost models, fitted to this GPU."""
