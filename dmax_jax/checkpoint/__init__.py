"""Checkpoints in and out: the Hugging Face layout, converted models in Orbax's format, and the states of a training."""
