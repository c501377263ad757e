"""The products, attention and small operations that a model is made of, and what chooses between their makers."""
