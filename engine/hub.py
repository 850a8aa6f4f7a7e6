"""A model's name → a directory that holds it.

Must not import JAX: the leader and the routers resolve names too.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm.auto import tqdm

from engine.errors import CheckpointError

# Never pickles, and never code.
TEXT_PATTERNS = ("*.json", "*.tiktoken", "*.jinja", "*.txt")
WEIGHT_PATTERNS = ("*.safetensors",)

# A connection that breaks raises an error of the HTTP library beneath the hub's, which is another
# one from version to version; the hub's own HTTP error derives from that library's base.
_TRANSPORT_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])


def resolve_checkpoint(
    model_path: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    has_weights: bool = True,
    flag: str = "--model-path",
) -> Path:
    """Return the directory of a checkpoint, downloading it where it is a name on the hub.

    Args:
        model_path: An existing directory, or `owner/name` on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.
        download_dir: Cache to download into; by default the hub's own.
        on_progress: Told the bytes fetched and the bytes known of so far.
        has_weights: False fetches configuration and tokenizer alone.
        flag: What `model_path` was given by, for messages.

    Raises:
        CheckpointError: There is no such directory, and no such model can be fetched or found in
            the cache (HF_HUB_OFFLINE=1 looks there alone).
    """
    directory = Path(model_path).expanduser()
    if directory.is_dir():
        return directory
    if directory.is_absolute() or model_path.startswith((".", "~")) or model_path.count("/") > 1:
        raise CheckpointError(
            f"{flag}={model_path} is not a directory. Give a directory with config.json and "
            "safetensors, or a name on the Hugging Face hub, such as Qwen/Qwen2.5-0.5B-Instruct."
        )
    patterns = [*TEXT_PATTERNS, *(WEIGHT_PATTERNS if has_weights else ())]
    try:
        fetched = snapshot_download(
            model_path,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=patterns,
            tqdm_class=_progress_bar(on_progress),
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{model_path} is gated on the Hugging Face hub. Accept its licence there and set "
            "HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{model_path} has no --revision={revision} on the Hugging Face hub."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{flag}={model_path} is neither a directory nor a model on the Hugging Face hub."
        ) from error
    except (OSError, _TRANSPORT_ERROR) as error:
        is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        cause = "HF_HUB_OFFLINE is set" if is_offline else f"the hub cannot be reached ({error})"
        raise CheckpointError(
            f"{flag}={model_path} is not a directory, it is not whole in the cache "
            f"({download_dir or 'the default one'}), and {cause}. Download it first, or give a "
            "directory."
        ) from error
    directory = Path(fetched)
    if has_weights and not any(directory.glob(WEIGHT_PATTERNS[0])):
        raise CheckpointError(
            f"{model_path} has no safetensors on the Hugging Face hub. Pickles (*.bin) are not "
            "fetched, because reading them can run code; use a release or a revision that has "
            "safetensors."
        )
    return directory


def resolve_tokenizer(
    model_path: str,
    tokenizer_path: str | None,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
) -> Path:
    """Return the directory of a model's tokenizer: its own, unless another one is given.

    Raises:
        CheckpointError: As `resolve_checkpoint`.
    """
    return resolve_checkpoint(
        tokenizer_path or model_path,
        # A revision is one of the model's repository; another's would not know it.
        revision=None if tokenizer_path else revision,
        download_dir=download_dir,
        has_weights=False,
        flag="--tokenizer-path" if tokenizer_path else "--model-path",
    )


def _progress_bar(on_progress: Callable[[int, int], None]) -> type[tqdm]:
    """Make a bar that draws nothing and passes on the counts of the bar that counts bytes."""

    class ByteCount(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._is_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **(kwargs | {"disable": False, "file": _Nowhere()}))

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self._is_bytes and self.total:
                on_progress(int(self.n), int(self.total))
            return shown

    return ByteCount


class _Nowhere:
    """A text stream that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
