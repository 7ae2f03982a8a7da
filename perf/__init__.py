"""Speed: `python -m perf.sweep`."""
