"""A checkpoint's tensors → sharded arrays on this process's devices.

Each process reads the slices of its own devices and no others. Knows files and parameter names, not
what the parameters are for.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from engine.errors import CheckpointError
from engine.kernels.host_arrays import aligned_zeros, from_device_arrays
from engine.models.config import ModelConfig
from engine.models.names import CheckpointTensor
from engine.models.quantization import (
    Quantization,
    is_quantized,
    quantize_weight,
    quantized_shapes,
)
from engine.models.registry import (
    MODEL_FILES,
    ParameterSpec,
    Params,
    model_layout,
    parameter_specs,
)
from engine.models.safetensors_files import StoredTensor, find_tensors
from engine.sharding import ShardLayout, named_sharding

__all__ = ["OnBytes", "dummy_weights", "load_weights", "weight_shapes"]

OnBytes = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, from any thread, one call at a time."""

_NUM_READERS = 8
_MAX_FAULTS = 20
# Buffers that old conversions wrote although they follow from the configuration.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One parameter, how it is sharded, and where it lies in the checkpoint."""

    path: tuple[str | int, ...]
    spec: ParameterSpec
    sharding: NamedSharding
    source: CheckpointTensor

    @property
    def source_names(self) -> list[str]:
        """The tensor that it is, or those of all experts, in order."""
        name = self.source.name.replace("*", str(self.path[1]))
        if "#" not in name:
            return [name]
        return [name.replace("#", str(expert)) for expert in range(self.spec.shape[0])]

    @property
    def tensor_axes(self) -> tuple[str, ...]:
        """What the axes of one tensor mean."""
        return self.spec.axes[1:] if "#" in self.source.name else self.spec.axes


def load_weights(
    directory: Path,
    model_config: ModelConfig,
    mesh: Mesh,
    dtype: DTypeLike,
    *,
    quantization: Quantization = "none",
    on_progress: OnBytes = lambda done, total: None,
) -> Params:
    """Read a checkpoint's safetensors into sharded arrays.

    Args:
        directory: With model.safetensors, or several files and their index.
        model_config: Of the same directory.
        mesh: The model's; every process of it must call this.
        dtype: To convert to.
        quantization: "int8" gives each weight matrix as int8, and a `scale` beside it.
        on_progress: Told the bytes that are on this process's devices, and of how many.

    Returns:
        Nested dicts of arrays, as `Model` takes them.

    Raises:
        CheckpointError: No safetensors, or tensors that are missing, surplus or misshapen; all of
            them are named.
    """
    layout = model_layout(model_config, mesh.size)
    parameters = list(_parameters(model_config, mesh, dtype))
    tensors = _named_as_with_a_head(find_tensors(directory))
    _check_tensors(directory, parameters, tensors, layout, model_config)
    dtype = jnp.dtype(dtype)
    progress = _Progress(
        sum(_local_bytes(parameter, dtype) for parameter in parameters), on_progress
    )

    def load(parameter: _Parameter) -> jax.Array:
        sources = [tensors[name] for name in parameter.source_names]
        shards = _read_shards(parameter, sources, layout, dtype)
        array = from_device_arrays(parameter.spec.shape, parameter.sharding, shards)
        progress.add(_local_bytes(parameter, dtype))
        return array

    params: Params = {}
    with ThreadPoolExecutor(_NUM_READERS, "weights") as pool:
        for parameter, array in zip(parameters, pool.map(load, parameters), strict=True):
            _put_weight(params, parameter, array, quantization)
    return _with_layer_list(params)


def dummy_weights(
    model_config: ModelConfig,
    mesh: Mesh,
    dtype: DTypeLike,
    seed: int,
    *,
    quantization: Quantization = "none",
) -> Params:
    """Make random weights of the model's shapes, for benchmarks and tests.

    Each value follows from the seed, its parameter and its place in the unpadded parameter, so
    that any tp size gives the same model. Norms are ones, biases zeros, the rest uniform with the
    variance 1 / in.
    """
    layout = model_layout(model_config, mesh.size)
    make = jax.jit(_random_matrix, static_argnames=("sizes", "sharding", "dtype"))
    params: Params = {}
    for number, parameter in enumerate(_parameters(model_config, mesh, dtype)):
        spec, sharding = parameter.spec, parameter.sharding
        if len(spec.shape) == 1:
            fill = jnp.zeros if parameter.path[-1] == "bias" else jnp.ones
            array = fill(spec.shape, dtype, device=sharding)
        else:
            array = make(
                [layout.rows[axis].astype(np.int32) for axis in spec.axes],
                np.uint32((seed * 0x9E3779B1 + number) % 2**32),
                sizes=tuple(layout.sizes[axis] for axis in spec.axes),
                sharding=sharding,
                dtype=jnp.dtype(dtype),
            )
        _put_weight(params, parameter, array, quantization)
    return _with_layer_list(params)


def weight_shapes(
    model_config: ModelConfig,
    mesh: Mesh,
    dtype: DTypeLike,
    *,
    quantization: Quantization = "none",
) -> Params:
    """Shapes, dtypes and shardings of what `load_weights` gives."""
    params: Params = {}
    for parameter in _parameters(model_config, mesh, dtype):
        shape, sharding = parameter.spec.shape, parameter.sharding
        if _becomes_integers(parameter, quantization):
            _put(params, parameter, *quantized_shapes(shape, sharding))
        else:
            _put(params, parameter, jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))
    return _with_layer_list(params)


def _random_matrix(
    rows: list[jax.Array],
    seed: jax.Array,
    *,
    sizes: tuple[int, ...],
    sharding: NamedSharding,
    dtype: jnp.dtype,
) -> jax.Array:
    """Fill a parameter; `rows` says of each of its axes which row of the unpadded one, or -1."""
    place, is_real = jnp.zeros((), jnp.uint32), jnp.ones((), bool)
    for axis, (axis_rows, size) in enumerate(zip(rows, sizes, strict=True)):
        along = axis_rows.reshape([-1 if each == axis else 1 for each in range(len(sizes))])
        place = place * jnp.uint32(size) + along.astype(jnp.uint32)
        is_real = is_real & (along >= 0)
    bits = _mix(_mix(place) ^ _mix(seed))
    uniform = bits.astype(jnp.float32) * 2.0**-31 - 1.0
    values = jnp.where(is_real, uniform * (3.0 / sizes[-1]) ** 0.5, 0.0)
    return jax.lax.with_sharding_constraint(values.astype(dtype), sharding)


def _mix(bits: jax.Array) -> jax.Array:
    """Scramble uint32 so that each bit of the result depends on all (MurmurHash3's last step)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _parameters(model_config: ModelConfig, mesh: Mesh, dtype: DTypeLike) -> Iterator[_Parameter]:
    names = MODEL_FILES[model_config.architecture].checkpoint_names
    for path, spec in _flatten(parameter_specs(model_config, mesh, dtype)):
        pattern = ".".join("*" if isinstance(key, int) else key for key in path)
        yield _Parameter(path, spec, named_sharding(mesh, spec.axes), names[pattern])


def _flatten(specs: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, ParameterSpec]]:
    if isinstance(specs, ParameterSpec):
        yield path, specs
        return
    items = enumerate(specs) if isinstance(specs, list) else specs.items()
    for key, value in items:
        yield from _flatten(value, (*path, key))


def _becomes_integers(parameter: _Parameter, quantization: Quantization) -> bool:
    return quantization == "int8" and is_quantized(parameter.spec.axes)


def _put_weight(
    params: Params, parameter: _Parameter, array: jax.Array, quantization: Quantization
) -> None:
    if _becomes_integers(parameter, quantization):
        _put(params, parameter, *quantize_weight(array))
    else:
        _put(params, parameter, array)


def _put(params: Params, parameter: _Parameter, weight: Any, scale: Any = None) -> None:
    path: tuple[Any, ...] = parameter.path
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = weight
    if scale is not None:
        params["scale"] = scale


def _with_layer_list(params: Params) -> Params:
    return params | {"layers": [params["layers"][number] for number in sorted(params["layers"])]}


def _named_as_with_a_head(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Names as they are where the model has a head: Qwen3-Embedding was saved without one."""
    if "embed_tokens.weight" not in tensors:
        return tensors
    return {
        name if name.startswith("lm_head.") else f"model.{name}": tensor
        for name, tensor in tensors.items()
    }


def _check_tensors(
    directory: Path,
    parameters: list[_Parameter],
    tensors: dict[str, StoredTensor],
    layout: ShardLayout,
    model_config: ModelConfig,
) -> None:
    faults: dict[str, None] = {}
    expected: set[str] = set()
    for parameter in parameters:
        shape = tuple(layout.sizes[axis] for axis in parameter.tensor_axes)
        shape = (shape[0] * parameter.source.num_parts, *shape[1:])
        for name in parameter.source_names:
            expected.add(name)
            if name not in tensors:
                faults[f"missing: {name} {list(shape)}"] = None
            elif tensors[name].shape != shape:
                got = list(tensors[name].shape)
                faults[f"misshapen: {name} is {got}, not {list(shape)}"] = None
    for name, tensor in tensors.items():
        is_tied_copy = name == "lm_head.weight" and model_config.tie_word_embeddings
        if name not in expected and not is_tied_copy and not name.endswith(_IGNORED_SUFFIXES):
            faults[f"surplus: {name} {list(tensor.shape)}"] = None
    if faults:
        lines = list(faults)[:_MAX_FAULTS]
        if len(faults) > _MAX_FAULTS:
            lines.append(f"and {len(faults) - _MAX_FAULTS} more")
        raise CheckpointError(
            f"{len(faults)} tensors of {directory} do not fit its config.json "
            f"({model_config.architecture}, {model_config.num_layers} layers):\n  "
            + "\n  ".join(lines)
        )


def _read_shards(
    parameter: _Parameter, tensors: list[StoredTensor], layout: ShardLayout, dtype: jnp.dtype
) -> dict[Any, np.ndarray]:
    """Read what this process's devices hold, each distinct slice once."""
    num_parts = parameter.source.num_parts
    part_rows = tensors[0].shape[0] // num_parts
    first_row = parameter.source.part * part_rows
    indices = parameter.sharding.addressable_devices_indices_map(parameter.spec.shape)
    read: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}
    shards = {}
    for device, index in indices.items():
        assert index is not None
        key = tuple((part.start, part.stop) for part in index)
        if key not in read:
            # Experts lie on every device, each with its part of every one.
            tensor_index = index[len(index) - len(parameter.tensor_axes) :]
            rows = [
                layout.rows[axis][part]
                for axis, part in zip(parameter.tensor_axes, tensor_index, strict=True)
            ]
            sources = (tensor.map()[first_row : first_row + part_rows] for tensor in tensors)
            shape = parameter.sharding.shard_shape(parameter.spec.shape)
            read[key] = _gather(sources, rows, shape, dtype)
        shards[device] = read[key]
    return shards


def _gather(
    sources: Iterable[np.ndarray],
    rows: list[np.ndarray],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> np.ndarray:
    """Copy the given rows (and columns) of mapped tensors one behind the other; -1 gives zeros."""
    result = aligned_zeros(shape, dtype)
    runs = [list(_runs(axis_rows)) for axis_rows in rows]
    places = result.reshape(-1, *(len(axis_rows) for axis_rows in rows))
    for place, source in zip(places, sources, strict=True):
        for to_rows, from_rows in runs[0]:
            if len(rows) == 1:
                place[to_rows] = source[from_rows]
                continue
            for to_columns, from_columns in runs[1]:
                place[to_rows, to_columns] = source[from_rows, from_columns]
    return result


def _runs(rows: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Cut a row map into (where to, where from) slices, leaving out padding."""
    breaks = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] < 0)) + 1
    for start, stop in zip([0, *breaks], [*breaks, len(rows)], strict=True):
        if rows[start] >= 0:
            yield slice(start, stop), slice(rows[start], rows[start] + stop - start)


def _local_bytes(parameter: _Parameter, dtype: jnp.dtype) -> int:
    shard = parameter.sharding.shard_shape(parameter.spec.shape)
    num_devices = len(parameter.sharding.addressable_devices)
    return int(np.prod(shard)) * dtype.itemsize * num_devices


class _Progress:
    """Sums bytes over the reading threads."""

    def __init__(self, total: int, on_progress: OnBytes) -> None:
        self._total = total
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._done = 0

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._on_progress(self._done, self._total)
