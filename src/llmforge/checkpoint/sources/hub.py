"""A model on the Hugging Face Hub: downloaded into its cache, then read as a directory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmforge.artifact import Progress, Warn
from llmforge.checkpoint.families import read_config
from llmforge.checkpoint.families.own import OwnFamily
from llmforge.checkpoint.sources.hf import CONFIG, HfSource
from llmforge.checkpoint.tokenizer_files import FILES
from llmforge.errors import SourceError

# "org/name"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Not *.safetensors: some models carry the same weights again under other names.
_SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_BIN = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def is_hub_id(source: str | Path) -> bool:
    """Whether this names a model on the Hub: it looks like one and is not a path that exists."""
    text = str(source)
    return (
        isinstance(source, str)
        and not Path(text).exists()
        and ".." not in text
        and _HUB_ID.fullmatch(text) is not None
    )


def hub_source(
    repo_id: str,
    revision: str | None,
    progress: Progress,
    warn: Warn,
    own: OwnFamily | None = None,
) -> HfSource:
    """Download the model, as far as it is not in the cache, and open it. The config comes first,
    so that a model that is not supported is refused before its weights are fetched."""
    directory = _download(repo_id, revision, (CONFIG, *FILES), progress)
    if not (directory / CONFIG).is_file():
        raise SourceError(f"{repo_id} on the Hub has no config.json: it is not a model to convert")
    read_config(directory / CONFIG, own)
    commit = directory.name
    directory = _download(repo_id, commit, _SAFETENSORS, progress)
    if not any(directory.glob("*.safetensors")):
        directory = _download(repo_id, commit, _BIN, progress)
    return HfSource(directory, warn, {"name": repo_id, "revision": commit}, own)


def _download(
    repo_id: str, revision: str | None, patterns: Sequence[str], progress: Progress
) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise SourceError(
            f"{repo_id} is not a directory, and reading from the Hub needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from error
    where = f"{repo_id} on the Hub" + (f" at revision {revision}" if revision else "")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(patterns),
                tqdm_class=_reporter(progress),
            )
        )
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{where} is gated: accept its terms on huggingface.co, then log in with: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"{repo_id} is neither a directory here nor a model on the Hub (or it is private: "
            "log in with: hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{repo_id} on the Hub has no revision {revision!r}") from error
    except Exception as error:  # network libraries differ by version of huggingface_hub
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(
            f"{repo_id} is not a directory here, and {where} cannot be downloaded: {lines[0]}"
        ) from error


def _reporter(progress: Progress) -> Any:
    """A stand-in for tqdm that prints nothing and reports bytes to `progress`."""
    from tqdm.auto import tqdm

    class Reporter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._in_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)
            self.total = kwargs.get("total") or 0
            self.n = kwargs.get("initial") or 0

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            if self._in_bytes and self.total:
                progress("downloading", int(self.n), int(self.total))
            return None

    return Reporter
