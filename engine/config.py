"""The one configuration: what a user may set, its bounds and its help.

Field names are the command line's flags (`dist_init_addr` is `--dist-init-addr`) and the keys of a
YAML file's `args:`. This file must not know what any field makes the engine do, nor import JAX.
"""

import difflib
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.errors import ConfigError
from engine.tpu_slice import Slice

_NEED_MAX_ENGINES = frozenset(
    ("min_engines", "target_load", "target_queue_delay_s", "upscale_delay_s", "downscale_delay_s")
)
PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class EngineConfig(BaseModel):
    """What one engine (a gang of hosts holding one model) is and how it serves.

    Frozen: "auto" values (None) are resolved once, into a new object.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_path: str = Field(
        description="Name on the Hugging Face hub, or a directory with config.json and safetensors."
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit on the hub. Default: the repository's main branch.",
    )
    tokenizer_path: str | None = Field(
        default=None, description="Where the tokenizer lies, if not beside the model."
    )
    served_model_name: str | None = Field(
        default=None,
        description="Name that clients use. Default: --model-path; its last part works too.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Accepted for compatibility; code from a checkpoint is never run, because "
        "every supported family is built in.",
    )
    load_format: Literal["auto", "safetensors", "dummy"] = Field(
        default="auto", description="dummy: random weights from config.json alone, for benchmarks."
    )
    quantization: Literal["none", "int8"] = Field(
        default="none",
        description="int8: weights as 8-bit integers with a scale per output, activations with one "
        "per token; half the memory and, on CPUs, half the time of a step.",
    )
    download_dir: str | None = Field(
        default=None, description="Where hub downloads are kept. Default: the hub's own cache."
    )

    device: Literal["auto", "tpu", "cpu", "gpu"] = Field(
        default="auto", description="auto: tpu where the cluster has one, else gpu, else cpu."
    )
    tpu: str | None = Field(
        default=None,
        description="TPU slice that each engine takes, as in v6e:4x4 (in YAML also {generation: "
        "v6e, topology: 4x4}); sets --device, --tp-size and --nnodes, or is checked against them.",
    )
    tp_size: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Devices that share the model, over all hosts (tensor parallel).",
    )
    nnodes: int = Field(default=1, ge=1, le=256, description="Hosts that share the model.")
    node_rank: int = Field(default=0, ge=0, description="This host's rank, 0 to nnodes - 1.")
    dist_init_addr: str | None = Field(
        default=None,
        description="host:port of rank 0, where the cluster forms; 0.0.0.0 only with one node.",
    )
    dist_timeout_s: float = Field(
        default=300.0, gt=0, description="Seconds that a rank may take to join jax.distributed."
    )
    start_timeout_s: float = Field(
        default=3600.0,
        gt=0,
        description="Seconds that weights and compilation may take at start.",
    )
    host_timeout_s: float = Field(
        default=4.0, gt=0, description="Seconds of silence after which a host counts as dead."
    )
    host_quarantine_s: float = Field(
        default=600.0,
        ge=0,
        description="Seconds for which a TPU host that failed twice is left alone, where there is "
        "another to take or to wait for. 0: never.",
    )

    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="auto: the checkpoint's own, with float16 read as bfloat16."
    )
    random_seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Seed of dummy weights and of requests that bring no seed.",
    )
    attention_backend: Literal["auto", "fa", "xla", "dense"] = Field(
        default="auto",
        description="fa: flash attention, the best kernel of the platform. xla: the flash loop in "
        "XLA. dense: the whole score matrix, slow, for debugging.",
    )
    page_size: Literal[1, 2, 4, 8, 16, 32, 64, 128] = Field(
        default=16, description="Tokens in a page of the KV cache."
    )
    context_length: int | None = Field(
        default=None,
        ge=1,
        description="Longest prompt plus output. Default: what the checkpoint allows.",
    )
    mem_fraction_static: float = Field(
        default=0.88,
        gt=0,
        le=1,
        description="Share of device memory for weights and KV pages together (on CPU: of host "
        "memory, divided by the ranks on that host).",
    )
    max_total_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens that the KV cache holds. Default: from --mem-fraction-static.",
    )
    max_running_requests: int = Field(
        default=64, ge=1, le=4096, description="Requests that decode together in one step."
    )
    num_engines: int = Field(
        default=1,
        ge=1,
        description="Copies of the model, each on hosts of its own, that share the requests.",
    )
    min_engines: int | None = Field(
        default=None,
        ge=0,
        description="With --max-engines: fewest engines. 0: none runs while nobody asks, and the "
        "next request waits until one has started. Default: 1.",
    )
    max_engines: int | None = Field(
        default=None,
        ge=1,
        description="Most engines; their number follows the load and --num-engines is not used. "
        "Default: it is fixed.",
    )
    target_load: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="With --max-engines: share of their slots (--max-running-requests) and of "
        "their KV pages that engines should use; above it, more are started.",
    )
    target_queue_delay_s: float = Field(
        default=2.0,
        gt=0,
        description="With --max-engines: a queue that is older counts as too much load.",
    )
    upscale_delay_s: float = Field(
        default=10.0,
        ge=1,
        description="With --max-engines: seconds that too much load must last before engines are "
        "started; the arrivals of that time say how many.",
    )
    downscale_delay_s: float = Field(
        default=300.0,
        ge=1,
        description="With --max-engines: seconds that fewer engines must have been enough before "
        "any is stopped, and that nobody must have asked before the last one is.",
    )
    num_routers: int = Field(
        default=1,
        ge=1,
        description="Routers, which speak HTTP; the fewest of them with --max-routers.",
    )
    max_routers: int | None = Field(
        default=None,
        ge=1,
        description="Most routers: their number follows the requests in flight. Default: it is "
        "fixed at --num-routers.",
    )
    max_queued_requests: int = Field(
        default=1024,
        ge=1,
        description="Requests that may wait in each router; one more is refused with HTTP 429.",
    )
    max_queued_tokens: int = Field(
        default=4_194_304,
        ge=1,
        description="Prompt tokens that may wait in each router; past that, HTTP 429.",
    )
    max_stored_responses: int = Field(
        default=10_000,
        ge=0,
        description="Answers of /v1/responses that each engine keeps in memory, 256 MB at most, "
        "for those who ask for them again or go on with them within a day. 0: none.",
    )
    max_prefill_tokens: int = Field(
        default=8192, ge=1, description="Most prompt tokens that one step computes."
    )
    chunked_prefill_size: int | None = Field(
        default=None,
        ge=1,
        description="Longer prompts are computed in chunks of this many tokens, so that decodes go "
        "on between them. Default: min(2048, --max-prefill-tokens).",
    )
    enable_prefix_caching: bool = Field(
        default=True, description="Keep pages of finished requests for prompts that begin alike."
    )
    disable_overlap_schedule: bool = Field(
        default=False,
        description="Plan a step only after the step before has ended (for debugging).",
    )
    jax_precompile_prefill_token_paddings: tuple[int, ...] = Field(
        default=(),
        description="Prefill sizes to compile at start beside the computed ones.",
    )
    skip_server_warmup: bool = Field(
        default=False,
        description="Skip the request that the engine sends itself before it reports ready.",
    )
    jax_compilation_cache_dir: str | None = Field(
        default=None,
        description="Where compiled programs are kept. Default: JAX_COMPILATION_CACHE_DIR, else "
        "the user's cache folder.",
    )
    compiled_programs: str | None = Field(
        default=None,
        description="Folder or address (gs://, s3://, ...) that `qwen-on-ray compile --output` "
        "wrote, where each host fetches compiled programs at start. Default: none.",
    )

    tool_call_parser: Literal["auto", "none", "hermes", "qwen3_coder", "react"] = Field(
        default="auto",
        description="How the model calls tools. auto goes by its chat template: hermes for "
        "Qwen2.5 and Qwen3, qwen3_coder, and react for Qwen1, which has none. none: not at all.",
    )
    reasoning_parser: Literal["auto", "none", "qwen3"] = Field(
        default="auto",
        description="auto, qwen3: what stands between <think> and </think> is given as reasoning, "
        "where the model knows these marks. none: as content.",
    )
    chat_template: str | None = Field(
        default=None,
        description="File with a Jinja chat template to use in place of the checkpoint's.",
    )
    api_key_file: str | None = Field(
        default=None,
        description="File with one SHA-256 hash of an API key per line, and after it what the key "
        "may do: admin, requests-per-minute=N, tokens-per-minute=N, concurrency=N. Default: no "
        "keys.",
    )
    hold_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds that a request waits for an engine that is starting. A stream hears "
        "of it every 10 s, by a comment.",
    )
    drain_timeout_s: float = Field(
        default=30.0,
        ge=0,
        description="Seconds that an engine which is stopped or replaced has to finish its "
        "requests. What lasts longer goes on with another one from its last token.",
    )
    profile_dir: str | None = Field(
        default=None,
        description="Directory on each host where POST /start_profile has JAX's profiler write a "
        "trace of the next steps. Default: that endpoint is off.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="How much is logged."
    )

    @field_validator("jax_precompile_prefill_token_paddings", mode="before")
    @classmethod
    def _one_padding_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="before")
    @classmethod
    def _a_slice_says_the_rest(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("tpu") is None:
            return values
        tpu = values["tpu"]
        try:
            tpu = Slice.of_fields(tpu) if isinstance(tpu, Mapping) else Slice.parse(str(tpu))
        except ConfigError as error:
            raise ValueError(f"--tpu: {error}") from None
        hosts = " or ".join(map(str, tpu.host_counts))
        expected: dict[str, tuple[tuple[Any, ...], str]] = {
            "device": (("tpu", "auto"), "is for TPUs"),
            "tp_size": ((tpu.num_devices,), f"has {tpu.num_devices} devices"),
            "nnodes": (tpu.host_counts, f"has {hosts} {'host' if hosts == '1' else 'hosts'}"),
        }
        for name, (allowed, what) in expected.items():
            if name in values and str(values[name]) not in map(str, allowed):
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{flag}={values[name]} does not go with --tpu={tpu}, which {what}. Leave "
                    f"{flag} out, or name another slice."
                )
        known = {"tp_size": tpu.num_devices, "nnodes": tpu.num_hosts}
        return {**known, **values, "device": "tpu", "tpu": str(tpu)}

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.node_rank >= self.nnodes:
            raise ValueError(
                f"--node-rank={self.node_rank} is not below --nnodes={self.nnodes}. "
                f"Ranks run from 0 to {self.nnodes - 1}."
            )
        if self.tp_size % self.nnodes:
            raise ValueError(
                f"--tp-size={self.tp_size} does not divide over --nnodes={self.nnodes} hosts. "
                f"Use a multiple of {self.nnodes}."
            )
        if self.dist_init_addr is not None:
            host, _, port = self.dist_init_addr.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError(
                    f"--dist-init-addr={self.dist_init_addr} is not host:port, "
                    "as in 10.0.0.2:10011."
                )
            if host == "0.0.0.0" and self.nnodes > 1:
                raise ValueError(
                    "--dist-init-addr=0.0.0.0 works with --nnodes=1 only: the other hosts must "
                    "know where rank 0 is. Give rank 0's own address."
                )
        if any(padding < 1 for padding in self.jax_precompile_prefill_token_paddings):
            raise ValueError(
                "--jax-precompile-prefill-token-paddings must be positive, got "
                f"{list(self.jax_precompile_prefill_token_paddings)}."
            )
        self._check_scaling()
        return self

    def _check_scaling(self) -> None:
        if self.max_engines is None:
            # What is set to its default says nothing: a configuration that was written out whole
            # and read back has all fields set.
            set_alone = self.model_dump(include=set(_NEED_MAX_ENGINES), exclude_defaults=True)
            if set_alone:
                flag = "--" + min(set_alone).replace("_", "-")
                raise ValueError(
                    f"{flag} does nothing without --max-engines, which lets the number of engines "
                    "follow the load. Give --max-engines, or --num-engines for a fixed number."
                )
        elif self.num_engines != type(self).model_fields["num_engines"].default:
            raise ValueError(
                f"--num-engines={self.num_engines} fixes the number of engines, and "
                f"--max-engines={self.max_engines} lets it follow the load. Give one of them; "
                "--min-engines is how many there are at least."
            )
        elif self.fewest_engines > self.max_engines:
            raise ValueError(
                f"--min-engines={self.min_engines} is above --max-engines={self.max_engines}."
            )
        if self.max_routers is not None and self.num_routers > self.max_routers:
            raise ValueError(
                f"--num-routers={self.num_routers} is above --max-routers={self.max_routers}."
            )

    @property
    def fewest_engines(self) -> int:
        """The resolved `min_engines`, where the number of engines follows the load."""
        return 1 if self.min_engines is None else self.min_engines

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names a client may use, the one reported by /v1/models first."""
        names = [self.served_model_name or self.model_path, self.model_path]
        names.append(PurePath(self.model_path).name)
        return tuple(dict.fromkeys(names))

    @property
    def weights_name(self) -> str:
        """What tells these weights from others: where they come from."""
        return self.model_path if self.revision is None else f"{self.model_path}@{self.revision}"

    @property
    def devices_per_host(self) -> int:
        return self.tp_size // self.nnodes

    @property
    def tpu_slice(self) -> Slice | None:
        """The slice that `tpu` names."""
        return None if self.tpu is None else Slice.parse(self.tpu)

    @property
    def chips_per_host(self) -> int:
        """TPU chips that a host needs; a chip is one device where no slice says otherwise."""
        tpu = self.tpu_slice
        return self.devices_per_host if tpu is None else tpu.num_chips // self.nnodes

    @property
    def prefill_chunk_tokens(self) -> int:
        """Most tokens of prompts that one step computes: the resolved `chunked_prefill_size`."""
        chunk = self.chunked_prefill_size or 2048
        return min(chunk, self.max_prefill_tokens)


def parse_config(args: Mapping[str, Any]) -> EngineConfig:
    """Make an `EngineConfig` of a mapping that a user wrote.

    Raises:
        ConfigError: With one line per fault; an unknown key names its nearest valid one.
    """
    try:
        return EngineConfig.model_validate(dict(args))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors())) from None


def _explain(fault: Mapping[str, Any]) -> str:
    name = str(fault["loc"][0]) if fault["loc"] else ""
    flag = "--" + name.replace("_", "-")
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, EngineConfig.model_fields, n=1)
        return f"Unknown flag {flag}." + (
            f" Did you mean --{near[0].replace('_', '-')}?" if near else ""
        )
    message = str(fault["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    if fault["type"] == "missing":
        return f"{flag} is required: {EngineConfig.model_fields[name].description}"
    return f"{flag}={fault['input']!r}: {message}."
