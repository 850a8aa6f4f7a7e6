"""Every program of an engine, described by shapes: what is compiled at its start, or ahead of it.

Holds no arrays and starts nothing, so that the same descriptions serve a runner on its devices and
a planner on devices that are not there.
"""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kernels.attention import Cache, make_attention
from engine.models.checkpoint import weight_shapes
from engine.models.config import ModelConfig
from engine.models.registry import make_model
from engine.runner.batch import BatchBuilder, padding_plan
from engine.runner.compilation import Program
from engine.runner.kv_cache import MemoryUse, bytes_per_device, num_pages, temporary_bytes
from engine.runner.likeliest import likeliest_on
from engine.runner.program_store import ProgramStore
from engine.runner.slot_state import (
    SlotState,
    admit,
    init_slot_state,
    padding_admission,
)
from engine.runner.step_program import make_masked_sampling, make_step
from engine.scheduling.buckets import bucket_table
from engine.sharding import ResidualStream
from engine.step import Bucket

ADMISSION = "admission"
MASKED_SAMPLING = "masked sampling"
PARALLEL_FROM = 256
"""Tokens of a step from which on TPUs share the residual stream out over tokens."""

CHUNK_OPTIONS = MappingProxyType({"xla_msa_max_repacks": 0})
"""The TPU compiler's options for steps of chunks up to `FEW_CHUNK_TOKENS`: what lies in the vector
memory is not rearranged again and again, a sixth of the compiler's work. Up to here their cycles
stay the same; of 8192 tokens they grow by a tenth."""

FEW_CHUNK_TOKENS = 2048

SLOT_PROGRAMS = (ADMISSION, MASKED_SAMPLING)
"""Programs of what the device holds of slots, beside the steps."""


class EnginePrograms:
    """The programs of one engine on one mesh.

    Args:
        config: The engine's.
        model_config: Of its checkpoint.
        mesh: Over the devices that will run them, or over those of a topology.
        chip: Which TPU, where the devices are of one.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        dtype: Of weights, activations and KV cache.
        model: Put together for the mesh.
        context_length: Longest prompt plus output.
        buckets: Shapes of the steps, cheapest first.
        replicated: Sharding of an array that every device holds whole.

    Raises:
        ConfigError: The context or the attention backend that is asked for is not to be had.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        mesh: Mesh,
        *,
        chip: pltpu.TpuInfo | None = None,
    ) -> None:
        self.platform: str = mesh.devices.flat[0].platform
        self.dtype = model_config.dtype if config.dtype == "auto" else config.dtype
        self.context_length = _context_length(config, model_config)
        self.buckets = bucket_table(
            config, context_length=self.context_length, platform=self.platform
        )
        self.pages_per_seq = -(-self.context_length // config.page_size)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self._config = config
        self._model_config = model_config
        self._mesh = mesh
        self._attention = make_attention(
            self.platform,
            config.attention_backend,
            mesh,
            dtype=self.dtype,
            head_dim=model_config.head_dim,
            page_size=config.page_size,
            chip=chip,
        )
        residual = ResidualStream(
            mesh=mesh, parallel_from=PARALLEL_FROM if self.platform == "tpu" else None
        )
        self.model = make_model(
            model_config, residual, self._attention, self.dtype, config.quantization
        )

    def open_store(self, folder: Path, source: str | None = None) -> ProgramStore:
        """Open the store of these programs below a folder; see `ProgramStore`.

        Raises:
            ConfigError: The source cannot be read.
        """
        config = self._config
        closed_over = [
            self._model_config,
            self.platform,
            self.dtype,
            config.quantization,
            config.attention_backend,
            config.page_size,
        ]
        return ProgramStore(folder, self._mesh, closed_over, source)

    @property
    def largest_bucket(self) -> Bucket:
        """The one whose program needs most memory."""
        return max(self.buckets, key=lambda bucket: (bucket.num_chunk_tokens, bucket.num_seqs))

    @property
    def names(self) -> tuple[Bucket | str, ...]:
        """All programs, the largest first: it says how much memory is left for pages."""
        largest = self.largest_bucket
        others = tuple(bucket for bucket in self.buckets if bucket != largest)
        return (largest, *others, *SLOT_PROGRAMS)

    def memory(
        self, params: Any, capacity: int, largest: jax.stages.Compiled | None = None
    ) -> MemoryUse:
        """What one device holds, as far as it is known.

        Args:
            params: The parameters, or their shapes.
            capacity: Bytes that the device has.
            largest: The program of `largest_bucket`, once it is compiled.
        """
        return MemoryUse(
            capacity=capacity,
            weights=bytes_per_device(params) + bytes_per_device(self.state_shapes()),
            page=bytes_per_device(self.cache_shapes(1)),
            temporaries=0 if largest is None else temporary_bytes(largest, len(self.names)),
        )

    def num_pages(self, memory: MemoryUse) -> int:
        """Pages that fit beside the rest.

        Raises:
            CapacityError: Too few.
        """
        return num_pages(
            self._config, memory, context_length=self.context_length, platform=self.platform
        )

    def param_shapes(self) -> Any:
        """Parameters as a checkpoint's loader lays them out."""
        return weight_shapes(
            self._model_config, self._mesh, self.dtype, quantization=self._config.quantization
        )

    def cache_shapes(self, num_pages: int) -> Cache:
        """The KV cache with that many pages."""
        return self._attention.cache_shapes(
            num_layers=self._model_config.num_layers,
            num_kv_heads=self.model.layout.num_kv_heads,
            head_dim=self._model_config.head_dim,
            num_pages=num_pages,
            page_size=self._config.page_size,
            dtype=self.dtype,
        )

    def state_shapes(self) -> SlotState:
        """What the devices remember of slots."""
        return self._whole(jax.eval_shape(self.init_state))

    def init_state(self) -> SlotState:
        """The state of an engine without requests."""
        return init_slot_state(self._config.max_running_requests, self._model_config.vocab_size)

    def batch_builder(self) -> BatchBuilder:
        """Make what lays out the steps' inputs."""
        return BatchBuilder(
            num_slots=self._config.max_running_requests,
            pages_per_seq=self.pages_per_seq,
            vocab_size=self._model_config.vocab_size,
        )

    def program(self, name: Bucket | str, params: Any, num_pages: int) -> Program:
        """Describe one program.

        Args:
            name: A bucket, or one of `SLOT_PROGRAMS`.
            params: The parameters, or their shapes.
            num_pages: Of the KV cache.
        """
        state = self.state_shapes()
        likeliest = likeliest_on(self.platform)
        if isinstance(name, str):
            if name == ADMISSION:
                function, nothing = (
                    admit,
                    padding_admission(
                        self._config.max_running_requests, self._model_config.vocab_size
                    ),
                )
            else:
                function = make_masked_sampling(likeliest)
                (nothing,) = self.batch_builder().build_masked(padding_plan(self.buckets[0]), ())
            jitted = jax.jit(function, donate_argnums=0, out_shardings=self.replicated)
            return Program(name, jitted, (state, self._whole(nothing)))
        cache = self.cache_shapes(num_pages)
        inputs = self._whole(self.batch_builder().build(padding_plan(name)))
        cache_shardings = jax.tree.map(lambda array: array.sharding, cache)
        step = make_step(self.model, page_size=self._config.page_size, likeliest=likeliest)
        jitted = jax.jit(
            step,
            donate_argnums=(1, 2),
            out_shardings=(self.replicated, cache_shardings, self.replicated),
            compiler_options=self._compiler_options(name),
        )
        shapes = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding),
            params,
        )
        return Program(f"step of {describe_program(name)}", jitted, (shapes, cache, state, inputs))

    def _compiler_options(self, bucket: Bucket) -> dict[str, bool | int | str] | None:
        is_wanted = self.platform == "tpu" and 0 < bucket.num_chunk_tokens <= FEW_CHUNK_TOKENS
        return dict(CHUNK_OPTIONS) if is_wanted else None

    def _whole(self, arrays: Any) -> Any:
        return jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.replicated),
            arrays,
        )


def describe_program(name: Bucket | str) -> str:
    """A program's name for people."""
    if isinstance(name, str):
        return name
    chunks = f" + {name.num_chunk_tokens} prefill tokens" if name.num_chunk_tokens else ""
    return f"{name.num_seqs} decodes{chunks}"


def _context_length(config: EngineConfig, model_config: ModelConfig) -> int:
    if config.context_length is None:
        return model_config.context_length
    if config.context_length > model_config.context_length:
        raise ConfigError(
            f"--context-length={config.context_length} is longer than the model's "
            f"{model_config.context_length}. Give at most that, or leave it out."
        )
    return config.context_length
