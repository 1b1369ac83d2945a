"""`fourfold <verb>`: thin commands over the rest of the house."""
