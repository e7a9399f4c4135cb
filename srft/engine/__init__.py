"""Rollout engines: what the trainer asks of one, and those there are."""
