"""Arithmetic of PTX on numpy arrays: number formats, conversions, packed halves, integers.

All functions work on whole rows of lanes and know nothing of warps or memory.
"""
