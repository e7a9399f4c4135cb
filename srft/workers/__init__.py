"""Processes in which code of the user's runs, one item at a time, each under a hard deadline."""
