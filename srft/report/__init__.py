"""What a person looks at afterwards: plots and page, made from the run folder."""
