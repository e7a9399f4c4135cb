"""What a completion earns: the pool of verifier processes, and the verifiers."""
