"""What a call asks for: all that is known before a kernel is chosen."""
