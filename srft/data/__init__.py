"""Prompts and demonstrations: from the rows of a source to tokens, in an order."""
