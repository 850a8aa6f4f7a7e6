"""Where a model's tokenizer and template files lie: a directory, or a download from the hub.

Only these few files are fetched; the weights are the hosts' business.
"""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engine.errors import CheckpointError

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "qwen.tiktoken",
    "chat_template.jinja",
)


def locate_text_files(
    model_path: str, *, revision: str | None = None, download_dir: str | None = None
) -> Path:
    """Return a directory with the text files of a model on disk or on the hub.

    Raises:
        CheckpointError: It is no directory, and the hub does not have it or cannot be reached.
    """
    directory = Path(model_path).expanduser()
    if directory.is_dir():
        return directory
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model_path,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=list(TEXT_FILES),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model_path} is no directory here, and its tokenizer could not be had from the hub: "
            f"{error} Check --model-path, or say where the tokenizer lies with --tokenizer-path."
        ) from error
