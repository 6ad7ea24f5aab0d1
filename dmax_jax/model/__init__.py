"""LLaDA2-MoE as pure functions on parameter pytrees.

Array names end in their dimensions, one letter each:
B batch rows, T positions, S key positions, W block length, D model width, N query heads, K key/value heads, H head
width, G query heads per key/value head, R rotated half width, F feed-forward width, E experts, X experts per token,
M routed rows (batch rows times positions), V vocabulary.
"""
