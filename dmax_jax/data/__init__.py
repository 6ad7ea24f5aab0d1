"""Tokenizer and chat template, training examples, the input pipeline, and tasks that generate their own data."""
