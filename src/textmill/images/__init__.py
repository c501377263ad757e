"""Pictures in prompts: where they come from, what may be decoded, and how each family cuts and sizes them."""
