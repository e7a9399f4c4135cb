"""The lm_head in chunks of rows: scores, the sweep over them, and gradients."""
