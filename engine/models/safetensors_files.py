"""The safetensors of a checkpoint: which file holds which tensor, and rows of them.

Reads no more than it is asked for: a rank of a large model touches only its own part of the files.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from engine.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        path: Its file.
        dtype: As stored.
        shape: As stored.
        offset: Of its first byte in the file.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def map(self) -> np.ndarray:
        """Map the tensor into memory, read-only; pages are read when they are touched."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Read the headers of a checkpoint's safetensors.

    Returns:
        Tensor name → where it lies.

    Raises:
        CheckpointError: No safetensors, a file that the index names is missing, or a header is
            malformed.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(directory):
        tensors |= _read_header(path)
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_NAME
    if index.exists():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} has no readable weight_map: {error!r}.") from error
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise CheckpointError(
                f"{index} names files that are not in {directory}: {', '.join(missing)}. "
                "Download the checkpoint again."
            )
        return [directory / name for name in names]
    if (directory / SINGLE_NAME).exists():
        return [directory / SINGLE_NAME]
    pickles = sorted(path.name for pattern in _PICKLE_PATTERNS for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds its weights as pickles ({', '.join(pickles[:3])}), which can run "
            "code when they are read. Convert them to safetensors."
        )
    raise CheckpointError(
        f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}. "
        "--load-format=dummy needs no weights."
    )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    # https://huggingface.co/docs/safetensors: length of the header as a little-endian uint64, the
    # header as JSON, then the tensors, row-major, at offsets that count from the header's end.
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {header_bytes} bytes in a file of {size}")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        return {
            name: _stored_tensor(path, entry, 8 + header_bytes, size)
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}. Download it again."
        ) from error


def _stored_tensor(path: Path, entry: dict, start: int, size: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(
            f"{path} holds tensors of {entry['dtype']}. Supported: {', '.join(_DTYPES)}; "
            "quantized checkpoints are not."
        )
    tensor = StoredTensor(
        path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0]
    )
    num_bytes = int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
    first, stop = entry["data_offsets"]
    if stop - first != num_bytes or start + stop > size:
        raise ValueError(f"a tensor of {num_bytes} bytes at {first} to {stop}, file of {size}")
    return tensor
