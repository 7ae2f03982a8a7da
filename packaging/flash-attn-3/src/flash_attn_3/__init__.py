"""FlashAttention-3's package name, computed by fa3."""

__version__ = "3.0.0+fa3"
