"""What touches the vocabulary: statistics and gradient of rows of scores, on CPU and GPU."""
