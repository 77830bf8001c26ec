"""Text to token ids and back: tokenizer, chat templates, and a model's output taken apart."""
