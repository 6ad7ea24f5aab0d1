"""DMax diffusion language models in JAX: on-policy uniform training and soft parallel decoding."""

__version__ = "0.1.0"
