"""What `moeinf doctor` has measured, by device: one file of this user for each kind of device."""

from __future__ import annotations

import json
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moeinf.output_files import cache_folder, replacing


class Measured:
    """The file `name`.json below XDG_CACHE_HOME.

    A measurement is valid for its device and version of moeinf. `otherwise`: what happens without
    one, for the warning that a file is damaged.
    """

    def __init__(self, name: str, otherwise: str):
        self._name = name
        self._otherwise = otherwise
        self._format = f"moeinf-{name}-1"

    def path(self) -> Path:
        return cache_folder() / f"{self._name}.json"

    def put(self, device: str, found: dict[str, Any]) -> Path:
        """Keeps it beside those of other devices. Raises OSError where it cannot be written."""
        try:
            target = self.path()
        except RuntimeError as error:
            raise FileNotFoundError(f"{self._name}.json: no home folder: {error}") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": self._format, "devices": self._read() | {_key(device): found}}
        with replacing(target) as part:
            part.write_text(json.dumps(content, indent=2))
        return target

    def get(self, device: str) -> Any:
        """None if this device was never measured with this version, and for a user without a home
        of their own."""
        try:
            return self._read().get(_key(device))
        except RuntimeError:
            return None

    def warn(self, problem: str) -> None:
        warnings.warn(
            f"{self.path()}: {problem}; {self._otherwise}. `moeinf doctor` measures anew",
            stacklevel=5,
        )

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path().read_text())
        except (FileNotFoundError, NotADirectoryError, PermissionError):  # another user's home
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.warn(str(error))
            return {}
        if not isinstance(content, dict) or content.get("format") != self._format:
            self.warn(f"expected the format {self._format}")
            return {}
        devices = content.get("devices")
        if not isinstance(devices, dict):
            self.warn("expected 'devices' by name")
            return {}
        return devices


def _key(device: str) -> str:
    try:
        ours = version("moeinf")
    except PackageNotFoundError:  # a checkout whose core was built in place
        ours = "in place"
    return f"{device}, moeinf {ours}"
