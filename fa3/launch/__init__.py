"""How a call runs: which kernel, laid out how, compiled and kept."""
