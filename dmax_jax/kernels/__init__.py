"""Array functions and their GPU kernels; nothing here knows a model."""
