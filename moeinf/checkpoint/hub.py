"""Checkpoints of the Hugging Face Hub, by names such as Qwen/Qwen3-30B-A3B.

huggingface_hub finds, downloads and caches. This file says which files are needed, and turns each
failure into one sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moeinf.errors import CheckpointError

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
CODE = ("*.py",)
SUBFOLDERS = "*/*"  # original/, metal/, onnx/ have the weights again; `*` matches a slash too


def fetch(
    name: str, revision: str | None, files: Sequence[str] = (), *, with_code: bool = False
) -> Path:
    """The folder in the cache where those files of a repository lie; downloads what is missing.

    Without `files`: the configuration, the tokenizer and the index of the weights, and code that
    comes with them.

    Raises:
        CheckpointError: they can be had neither from the cache nor from the Hub.
    """
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name}: expected a checkpoint folder, or a name on the Hub such as "
            "Qwen/Qwen3-30B-A3B; found no such folder"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name}: expected a checkpoint folder, found none; to get it from the Hub: "
            "pip install 'moeinf[hf]'"
        ) from None
    patterns = [*SMALL_FILES, *(CODE if with_code else ())]
    with _one_sentence(name, revision, files):
        try:
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=[*map(escape, files)] if files else patterns,
                    ignore_patterns=[SUBFOLDERS],
                )
            )
        except FileNotFoundError as error:
            # A part of the small files: those who need one that is missing name it.
            if files or not hasattr(error, "snapshot_path"):
                raise
            return Path(error.snapshot_path)


@contextmanager
def headers(name: str, folder: Path, missing: Sequence[str]) -> Iterator[Path]:
    """A folder that looks like the whole checkpoint to those who read headers alone.

    `folder` has the small files; the `missing` ones are weights. Each file of weights has its
    header, and a hole for the tensors.
    """
    from huggingface_hub import HfApi

    with _one_sentence(name, folder.name, missing):
        weights = HfApi().get_safetensors_metadata(name, revision=folder.name).files_metadata
    with TemporaryDirectory(prefix="moeinf-") as made:
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                (Path(made) / file.name).symlink_to(file.resolve())
        for shard, header in weights.items():
            _write_header(Path(made) / shard, header)
        yield Path(made)


def _write_header(path: Path, header: Any) -> None:
    tensors = {
        name: {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": tensor.data_offsets,
        }
        for name, tensor in header.tensors.items()
    }
    raw = json.dumps(tensors).encode()
    data_bytes = max((tensor.data_offsets[1] for tensor in header.tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + data_bytes)


@contextmanager
def _one_sentence(name: str, revision: str | None, files: Sequence[str]) -> Iterator[None]:
    """Says in one sentence what huggingface_hub says in several."""
    from huggingface_hub import constants, errors

    hub, wanted = constants.ENDPOINT, "a copy"
    if files:
        wanted = f"{files[0]} and {len(files) - 1} more" if files[1:] else files[0]
    try:
        yield
    except errors.GatedRepoError as error:
        said = f"its licence must be accepted at {hub}/{name}; then log in with `hf auth login`"
        raise CheckpointError(f"{name}: {said}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: expected a checkpoint folder or a repository of {hub}, found neither; "
            "private repositories need `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: {hub} has no revision {revision!r} of it") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        answer = getattr(error.__cause__, "response", None)
        why = f"{hub} cannot be reached" if answer is None else f"{hub} says {answer.status_code}"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        raise CheckpointError(
            f"{name}: expected a checkpoint folder, or {wanted} in {constants.HF_HUB_CACHE}; "
            f"found neither, and {why}"
        ) from error
    except errors.NotASafetensorsRepoError as error:
        raise CheckpointError(f"{name}: has no weights in safetensors files") from error
    except (
        errors.HfHubHTTPError,
        errors.HFValidationError,
        errors.SafetensorsParsingError,
    ) as error:
        raise CheckpointError(f"{name}: {hub}: {str(error).splitlines()[0]}") from error
