"""`fourfold bench kernels`: every kernel against the hardware's limit and the best library."""
