"""What a run will need before it starts: memory by part and seconds by part, from shapes alone."""
