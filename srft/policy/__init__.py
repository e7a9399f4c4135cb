"""The model that is trained: its body, its head, its proof, its checkpoints."""
