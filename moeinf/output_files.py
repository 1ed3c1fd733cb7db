"""Files that results are written to: checked before the work, then replaced whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where this user's programs keep what they have measured; below XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that relative paths are ignored.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "moeinf"


def check_writable(path: Path) -> None:
    """Checks before minutes of work that a result can be written to `path`.

    Raises:
        OSError: it is a folder, lies in no folder, or may not be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: cannot be written: expected a file, found a folder")
    folder = _target(path).parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: cannot be written, for {folder} is not a folder")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"{path}: cannot be written: permission denied")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file to write to. At the end it takes the place of the file at `path`.

    A link stays, and the file that it names is replaced. An older file's mode stays; a new one has
    the mode that the umask gives. What is no regular file, such as /dev/null, is written to.

    Raises:
        OSError: `path` cannot be written; the message names it.
    """
    path = Path(path)
    check_writable(path)
    target = _target(path)
    in_place = path.exists() and (not path.is_file() or not os.access(target.parent, os.W_OK))
    folder = Path(tempfile.gettempdir()) if in_place else target.parent
    part = folder / f".moeinf-{secrets.token_hex(8)}"
    try:
        part.touch(exist_ok=False)
        mode = (target if path.is_file() else part).stat().st_mode & 0o7777
        yield part
        if in_place:
            with part.open("rb") as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        else:
            part.chmod(mode)  # a library may have put a file of its own there
            part.replace(target)
    except OSError as error:
        raise type(error)(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _target(path: Path) -> Path:
    """The file that `path` names once its links are followed."""
    return Path(os.path.realpath(path))
