"""A short name for "these weights, computed this way", without reading all of the weights."""

import hashlib
from pathlib import Path

_HEADER_SIZE_BYTES = 8
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 8


def model_fingerprint(directory: Path, *, dtype: str, tp_size: int, load_format: str) -> str:
    """Hash config.json, each safetensors file's header and samples of its data, and the flags.

    Headers name every tensor, its shape and its place; weights of equal shapes that differ in
    values, as those of two fine-tunings do, are told apart by the samples.
    """
    digest = hashlib.sha256(f"{dtype} {tp_size} {load_format}".encode())
    digest.update((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name} {num_bytes}".encode())
        with path.open("rb") as file:
            header_len = int.from_bytes(file.read(_HEADER_SIZE_BYTES), "little")
            digest.update(file.read(header_len))
            data_start = file.tell()
            for sample in range(_NUM_SAMPLES):
                file.seek(data_start + (num_bytes - data_start) * sample // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return "fp_" + digest.hexdigest()[:10]
