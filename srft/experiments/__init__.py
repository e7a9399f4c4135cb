"""Suites of runs: arms that differ in options, the same seeds for each, and what they say with its uncertainty."""
