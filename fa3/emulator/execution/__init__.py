"""Launches, clusters, CTAs, warpgroups and the fragments of diverged lanes that run on them."""
