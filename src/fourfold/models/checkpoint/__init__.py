"""Where a model's configuration, weights and tokenizer come from."""
