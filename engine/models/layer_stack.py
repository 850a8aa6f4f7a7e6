"""Parameters as a CPU computes with them: weights packed, layers stacked, so that a step scans.

A scanned program compiles three to five times faster than one with its layers unrolled. But a scan
copies each layer's slice out of the stack before it multiplies: free while a layer stays in the
processor's cache, else up to twice the time of a step. Packed weights are not sliced: their product
takes the whole stack and the layer's number. Layers that are not made alike, some with a sliding
window or with experts, are stacked as far as alike ones follow each other. On TPUs layers stay
unrolled, because the compiler prefetches weights across layers only then.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from engine.kernels.packed_weight import JoinedWeight, PackedWeight, can_pack, pack_weights
from engine.models.config import ModelConfig

MAX_SCANNED_LAYER_BYTES = 16 * 2**20
"""Between a layer that a CPU's cache holds and one that it does not, where it is not packed.

Milliseconds of a step of 2 rows in bfloat16, unrolled and scanned: 23 and 22 at 7 MB a layer,
54 and 90 at 30 MB, 126 and 246 at 94 MB.
"""

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Maps of the same input, whose packed weights lie side by side, with the first of them."""

_Tree = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class LayerStack:
    """Parameters of layers that are made alike and follow each other.

    Attributes:
        params: A layer's, whose arrays have the layers along their first axis, bfloat16 as bits.
        num_layers: How many they are.
    """

    params: _Tree
    num_layers: int = field(metadata={"static": True})

    @property
    def scanned_part(self) -> _Tree:
        """What a scan over the stack is to slice: all but packed weights."""
        return jax.tree.map(
            lambda leaf: None if _is_packed(leaf) else leaf, self.params, is_leaf=_is_packed
        )

    def layer(self, slices: _Tree, number: jax.Array) -> _Tree:
        """One layer's parameters, of what a scan cut out of `scanned_part` and of the rest."""

        def pick(leaf: Any, part: Any) -> Any:
            if isinstance(leaf, JoinedWeight):
                return leaf
            return leaf.at_layer(number) if _is_packed(leaf) else _from_bits(part)

        return jax.tree.map(pick, self.params, slices, is_leaf=_is_packed)


def lay_out_for_cpu(model_config: ModelConfig, params: _Tree) -> _Tree:
    """Pack weights where there is a kernel for them, and stack layers where that pays.

    Args:
        model_config: Says which layers are made alike.
        params: Of `load_weights`. Its lists and dicts are emptied on the way, so that memory holds
            each parameter once, but for the one that is being moved.

    Returns:
        The parameters anew. Layers that are larger than `MAX_SCANNED_LAYER_BYTES` and not packed,
        and those that have no like beside them, are still by themselves.
    """
    head = "embed_tokens" if model_config.tie_word_embeddings else "lm_head"
    is_packed = can_pack(params[head]["weight"].dtype)
    if is_packed:
        packed = pack_weights([params[head].pop("weight")])
        params = params | {head: params[head] | {"weight": packed}}

    def kind(layer: int) -> tuple[int | None, bool]:
        return model_config.sliding_windows[layer], model_config.is_sparse(layer)

    unstacked: list[_Tree] = params["layers"]
    layers: list[_Tree | LayerStack] = []
    for _, numbers in groupby(range(len(unstacked)), kind):
        alike = [unstacked[number] for number in numbers]
        layer_bytes = sum(array.nbytes for _, array in _flatten(alike[0]))
        if len(alike) > 1 and (is_packed or layer_bytes <= MAX_SCANNED_LAYER_BYTES):
            num_layers = len(alike)
            layers.append(LayerStack(_join(alike, _stack, is_packed=is_packed), num_layers))
        elif is_packed:
            layers += [_join([layer], lambda only: only[0], is_packed=True) for layer in alike]
        else:
            layers += alike
    return params | {"layers": layers}


def _join(
    layers: list[_Tree], join: Callable[[list[jax.Array]], jax.Array], *, is_packed: bool
) -> _Tree:
    """Make one parameter of each that the layers have, weights packed, the rest by `join`."""
    joined: _Tree = {}
    packable = {
        path: is_packed and array.ndim > 1 and can_pack(array.dtype)
        for path, array in _flatten(layers[0])
    }
    for path, is_packable in packable.items():
        if not is_packable:
            _insert(joined, path, join([_remove(layer, path) for layer in layers]))
            continue
        first, *others = _side_by_side(path)
        if path != first:
            continue  # Packed with the first of them.
        maps = [[_remove(layer, each) for layer in layers] for each in (first, *others)]
        _insert(joined, first, pack_weights(*maps))
        for other in others:
            _insert(joined, other, JoinedWeight())
    return joined


def _side_by_side(path: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Paths of the weights that lie side by side with that one, itself included, in order."""
    *above, name, last = path
    group = next((group for group in JOINED if name in group), (name,))
    return [(*above, each, last) for each in group]


def _stack(arrays: list[jax.Array]) -> jax.Array:
    sharding = arrays[0].sharding
    assert isinstance(sharding, NamedSharding)
    stack = jax.jit(
        lambda *arrays: jnp.stack([_as_bits(array) for array in arrays]),
        out_shardings=NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec)),
    )
    return stack(*arrays)


def _as_bits(array: jax.Array) -> jax.Array:
    # A slice of stacked bfloat16 makes XLA CPU (of jax 0.10) convert the whole stack to float32 in
    # every step, 836 ms for SmolLM2's shape in place of 40; of integers it is a plain copy.
    if array.dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(array, jnp.uint16)
    return array


def _from_bits(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(array, jnp.bfloat16)
    return array


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedWeight | JoinedWeight)


def _flatten(tree: _Tree, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in _flatten(value, (*path, key))]


def _insert(tree: _Tree, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _remove(tree: _Tree, path: tuple[str, ...]) -> jax.Array:
    for key in path[:-1]:
        tree = tree[key]
    return tree.pop(path[-1])
