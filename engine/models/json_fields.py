"""A JSON file whose values are read by type; what is missing or of another type is named."""

import json
import math
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError


class JsonFields:
    """A JSON object of a checkpoint. Reading raises CheckpointError with the file and the key.

    A value under several names is taken from the first that is there and not null.

    Attributes:
        path: The file.
        values: The object as it stands.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def require(self, spellings: tuple[tuple[str, ...], ...]) -> None:
        """Raise one error that names everything missing; a value may have several spellings."""
        missing = [
            " or ".join(names)
            for names in spellings
            if all(self.values.get(name) is None for name in names)
        ]
        if missing:
            raise CheckpointError(f"{self.path} lacks {', '.join(missing)}.")

    def integer(self, *names: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._first(names, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._fault(names, value, f"an integer, at least {minimum}")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        value = self._first(names, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise self._fault(names, value, "a finite number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._first((name,), default)
        if not isinstance(value, bool):
            raise self._fault((name,), value, "true or false")
        return value

    def mapping(self, name: str) -> "JsonFields":
        """Return a nested object, empty where it is absent or null."""
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise self._fault((name,), value, "an object")
        return JsonFields(self.path, value)

    def _first(self, names: tuple[str, ...], default: Any) -> Any:
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is None:
            raise CheckpointError(f"{self.path} lacks {' or '.join(names)}.")
        return default

    def _fault(self, names: tuple[str, ...], value: Any, wanted: str) -> CheckpointError:
        name = next((name for name in names if name in self.values), names[0])
        return CheckpointError(f"{self.path}: {name} is {value!r}; it must be {wanted}.")


def read_json_object(path: Path) -> JsonFields:
    """Read a file.

    Raises:
        CheckpointError: It is missing, or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}. --model-path must be a directory with config.json "
            "and safetensors, or a name on the Hugging Face hub."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, not a JSON object.")
    return JsonFields(path, values)
