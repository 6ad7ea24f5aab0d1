"""How fast the project's loops run, and how fast the hardware would let them."""
