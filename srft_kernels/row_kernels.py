"""Triton row kernel."""

INTERPRETED = False
