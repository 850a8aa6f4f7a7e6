"""The highest scores of each row one by one: what TPUs take in place of a sort."""

import jax
import jax.numpy as jnp


def top_one_by_one(score_RV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` highest scores of each row, highest first, and their ids, the lowest first.

    Where scores are no numbers an id is valid, and nothing else.
    """
    R, V = score_RV.shape
    id_RV = jax.lax.broadcasted_iota(jnp.int32, score_RV.shape, 1)

    def find(place: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        last_R1, last_id_R1, found_RC, ids_RC = carry
        is_left_RV = score_RV < last_R1
        is_left_RV |= (score_RV == last_R1) & (id_RV > last_id_R1)
        best_R1 = jnp.max(jnp.where(is_left_RV, score_RV, -jnp.inf), axis=1, keepdims=True)
        is_best_RV = is_left_RV & (score_RV == best_R1)
        id_R1 = jnp.min(jnp.where(is_best_RV, id_RV, V), axis=1, keepdims=True)
        # Scores that are not numbers are never found; a valid id keeps them from spoiling others.
        id_R1 = jnp.minimum(id_R1, V - 1)
        found_RC = jax.lax.dynamic_update_slice_in_dim(found_RC, best_R1, place, axis=1)
        ids_RC = jax.lax.dynamic_update_slice_in_dim(ids_RC, id_R1, place, axis=1)
        return best_R1, id_R1, found_RC, ids_RC

    nothing = (
        jnp.full((R, 1), jnp.inf, score_RV.dtype),
        jnp.full((R, 1), -1, jnp.int32),
        jnp.zeros((R, count), score_RV.dtype),
        jnp.zeros((R, count), jnp.int32),
    )
    _, _, found_RC, ids_RC = jax.lax.fori_loop(0, count, find, nothing)
    return found_RC, ids_RC
