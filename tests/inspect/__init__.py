"""Reading compiled kernels."""
