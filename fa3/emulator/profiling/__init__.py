"""Counters and timelines of launches, in nominal time."""

from .profile import LaunchProfile, Profile

__all__ = ["LaunchProfile", "Profile"]
