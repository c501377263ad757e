"""What models are built of: parts that pull their own weights and keep no state; `ctx` is all they see of a step."""
