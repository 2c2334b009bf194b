"""What knows transformers, and nothing of the host."""
