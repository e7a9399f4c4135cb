"""Train language models on demonstrations and on their own rollouts at once."""
