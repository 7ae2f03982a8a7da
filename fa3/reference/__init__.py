"""The same results in plain torch, for CPU tensors."""
