"""Checkpoints by name: a folder, or a repository of the Hugging Face hub.

Everything about the hub (cache, token, endpoint, offline mode, resuming) is huggingface_hub's, which
reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qvl.runtime.errors import CheckpointError, DownloadError

# Files that a conversion reads; not the repository's other formats.
FILES: Final = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "qwen.tiktoken",
    "README.md",
)
# Read where a repository has no safetensors.
PICKLED: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")
_REPO: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk.

    Attributes:
        name: what output files are named after.
        repo: the hub repository it came from, if it did.
    """

    folder: Path
    name: str
    repo: str | None = None


def find_source(src: str | Path, *, revision: str | None = None, bars: bool = False) -> Source:
    """A folder as it is, or a repository downloaded into the hub's cache.

    Args:
        bars: let huggingface_hub draw its progress bars, where stderr is a terminal.

    Raises:
        CheckpointError: neither a folder nor the form of a repository id.
        DownloadError: the hub cannot be reached, or has no such repository.
    """
    text, folder = str(src), Path(src).expanduser()
    if not text:
        raise CheckpointError("no checkpoint given", hint="pass its folder, or a hub id")
    if folder.is_dir():
        return Source(folder, folder.resolve().name)
    if folder.exists():
        raise CheckpointError(
            f"{text}: a file, expected a checkpoint's folder", hint="pass the folder it lies in"
        )
    if not _REPO.fullmatch(text):
        raise CheckpointError(
            f"{text}: no such folder",
            hint="pass a checkpoint's folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct",
        )
    return Source(_download(text, revision, bars and sys.stderr.isatty()), text.rpartition("/")[2], text)


def _download(repo: str, revision: str | None, bars: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    def failed(what: str, hint: str) -> DownloadError:
        return DownloadError(f"{repo}: {what}", hint=hint)

    hide = not bars and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*FILES, *PICKLED]))
        return folder
    except hub.GatedRepoError as error:
        raise failed("access must be asked for", "accept its terms on the hub, then set HF_TOKEN") from error
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        raise failed(
            "the hub has no such repository or revision", "check the name; set HF_TOKEN if it is private"
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise failed(
                f"not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set",
                "unset HF_HUB_OFFLINE to download it",
            ) from error
        raise failed("the hub cannot be reached", "check the connection, or pass a local folder") from error
    # All other errors: a dropped connection, a full disk, a hash that does not fit. Which classes these are
    # depends on the HTTP library that this version of huggingface_hub happens to use.
    except Exception as error:
        raise failed(f"download failed: {error}", "run again: it resumes where it stopped") from error
    finally:
        if hide:
            enable_progress_bars()
