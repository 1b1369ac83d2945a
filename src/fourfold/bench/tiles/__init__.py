"""`fourfold bench tiles`: the tiles that the products take beside all that they might take."""
