"""The public losses, a file each: loss and gradient in one sweep over chunks of logits."""
