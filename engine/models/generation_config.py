"""generation_config.json: how a checkpoint's authors want it sampled. No JAX here."""

from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.models.json_fields import read_json_object

_GENERATION_DEFAULTS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}


def load_generation_defaults(directory: Path) -> dict[str, float | int]:
    """Read the sampling defaults that the checkpoint recommends.

    Returns:
        The subset of temperature, top_p, top_k, min_p and repetition_penalty that
        generation_config.json sets; temperature 0 where it turns sampling off.

    Raises:
        CheckpointError: The file is malformed.
    """
    generation = read_generation_config(directory)
    defaults: dict[str, float | int] = {}
    for name, kind in _GENERATION_DEFAULTS.items():
        value = generation.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(
                f"{directory / 'generation_config.json'}: {name} is {value!r}, not a number."
            )
        defaults[name] = kind(value)
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The file's fields; none where a checkpoint has no such file."""
    path = directory / "generation_config.json"
    return read_json_object(path).values if path.exists() else {}
