"""Reads properties of a Hugging Face model from its modules, without running it."""
