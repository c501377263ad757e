"""Model files: where they come from, what their headers say, and their tensors under Hugging Face names."""
