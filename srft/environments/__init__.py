"""What answers a policy between its turns: a class of the user's, or a built-in one, in processes of its own."""
