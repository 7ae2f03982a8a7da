"""Other libraries' hooks, one module each; each imports its library when it is itself imported."""
