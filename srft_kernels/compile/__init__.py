"""The ops as torch.compile sees them."""
