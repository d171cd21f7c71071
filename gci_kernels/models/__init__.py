"""What is found out about a Hugging Face model by looking at its modules, without running it."""
