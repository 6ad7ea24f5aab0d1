"""The hybrid embedding of soft parallel decoding: between a token and the mask, as sure as the model is."""

import jax
import jax.numpy as jnp


def soft_embedding(
    token_BWD: jax.Array, mask_D: jax.Array, confidence_BW: jax.Array, *, renormalise: bool = True
) -> jax.Array:
    """Mixes token and mask embeddings by confidence and restores the length (Eq. 9, 10). Returns [B, W, D] in float32.

    Mixing two directions shortens the vector; Eq. 10 (`renormalise`) stretches it to the mix of the two lengths. The
    official code adds 1e-6 to the norm, not under the root; parity needs the same.
    """
    token_BWD = token_BWD.astype(jnp.float32)
    mask_D = mask_D.astype(jnp.float32)
    p_BW1 = confidence_BW[:, :, None]
    mixed_BWD = p_BW1 * token_BWD + (1 - p_BW1) * mask_D[None, None, :]
    if not renormalise:
        return mixed_BWD
    token_norm_BW1 = jnp.linalg.norm(token_BWD, axis=-1, keepdims=True)
    target_BW1 = p_BW1 * token_norm_BW1 + (1 - p_BW1) * jnp.linalg.norm(mask_D)
    return mixed_BWD * (target_BW1 / (jnp.linalg.norm(mixed_BWD, axis=-1, keepdims=True) + 1e-6))
