"""A short name for "these weights, computed this way", without reading the weights."""

import hashlib
from pathlib import Path

_HEADER_SIZE_BYTES = 8


def model_fingerprint(directory: Path, *, dtype: str, tp_size: int, load_format: str) -> str:
    """Hash config.json, each safetensors file's size and header, and how they are computed.

    Headers name every tensor, its shape and its place; weights of equal shapes that differ in
    values alone are told apart by what the hub calls them: the directory's name.
    """
    digest = hashlib.sha256(f"{dtype} {tp_size} {load_format} {directory.resolve().name}".encode())
    digest.update((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            header_len = int.from_bytes(file.read(_HEADER_SIZE_BYTES), "little")
            digest.update(file.read(header_len))
    return "fp_" + digest.hexdigest()[:10]
