"""Settings that `moeinf tune` has found better for a checkpoint on this machine.

    moeinf tune --writes--> profiles/CHECKPOINT-DEVICE.json --read by--> moeinf.load, moeinf doctor

A profile is for one checkpoint, kind of device, machine and version of moeinf. Any other is
ignored, which is said once. Settings change no token, and one that the caller gives comes first.
"""

from __future__ import annotations

import json
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moeinf import _core
from moeinf.cpus import cpu_name, usable_cpus
from moeinf.output_files import cache_folder, replacing

FORMAT = "moeinf-profile-1"
KINDS: dict[str, type] = {
    "threads": int,
    "reader_threads": int,
    "chunk_bytes": int,
    "policy": str,
    "prefetch": str,
    "speculation": bool,
}
"""What a profile may set. `speculation` false: prompt lookup costs more than it gains."""
GATE = "gate"
_logger = logging.getLogger("moeinf.profiles")
_said: set[str] = set()


def machine() -> str:
    """What a profile was measured on, in words."""
    return f"{cpu_name()}, {usable_cpus()} usable processors"


def folder() -> Path:
    """Where profiles are kept."""
    return cache_folder() / "profiles"


def write(checkpoint: str, device: str, settings: dict[str, Any], path: str) -> Path:
    """Keeps the settings for the experts of that fingerprint. Raises OSError."""
    target = _file(checkpoint, device)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "path": path,
        "checkpoint": checkpoint,
        "device": device,
        "machine": machine(),
        "version": _version(),
        "settings": settings,
    }
    with replacing(target) as part:
        part.write_text(json.dumps(content, indent=2))
    return target


def settings_for(checkpoint: str, device: str) -> dict[str, Any]:
    """The settings for these experts; none where no profile is valid here, which is said once."""
    file = _file(checkpoint, device)
    if not file.exists():
        return {}
    content, fault = _read(file)
    if not fault and (content["checkpoint"], content["device"]) != (checkpoint, device):
        fault = f"it is of {content['checkpoint']} on {content['device']}, not of {file.stem}"
    if fault:
        if str(file) not in _said:
            _said.add(str(file))
            _logger.warning("%s: the profile is ignored: %s", file, fault)
        return {}
    found: dict[str, Any] = content["settings"]
    return found


def described() -> list[dict[str, Any]]:
    """Every profile: file, path of the checkpoint, settings, and the `fault` of one not valid."""
    rows = []
    for file in _files():
        content, fault = _read(file)
        row = {name: content.get(name) for name in ("path", "device", "settings")}
        rows.append({"file": str(file), **row, "fault": fault})
    return rows


def any_here() -> bool:
    """False: no file needs to be looked for."""
    return bool(_files())


def _files() -> list[Path]:
    try:
        return sorted(folder().glob("*.json"))
    except (OSError, RuntimeError):  # a user without a home
        return []


def _file(checkpoint: str, device: str) -> Path:
    return folder() / f"{checkpoint}-{device}.json"


def _read(file: Path) -> tuple[dict[str, Any], str]:
    """The content, and why it is not valid on this machine; "" where it is."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"it cannot be read: {error}"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return {}, f"expected format {FORMAT}"
    for name, here in (("machine", machine()), ("version", _version())):
        if content.get(name) != here:
            return content, f"it was measured with {name} {content.get(name)!r}, this is {here!r}"
    if not all(isinstance(content.get(name), str) for name in ("checkpoint", "device")):
        return content, "expected the names of a checkpoint and of a device"
    return content, _fault_of(content.get("settings"))


def _fault_of(settings: Any) -> str:
    if not isinstance(settings, dict):
        return f"settings are {settings!r}, expected an object"
    names = {"policy": _core.policy_names(), "prefetch": [*_core.prefetch_names(), GATE]}
    least = {"threads": 1, "reader_threads": 0, "chunk_bytes": 0}
    most = {"threads": usable_cpus(), "reader_threads": 256, "chunk_bytes": 1 << 30}
    for name, value in settings.items():
        right = type(value) is KINDS.get(name)
        if right and name in names:
            right = value in names[name]
        elif right and name in least:
            right = least[name] <= value <= most[name]
        if right and name == "chunk_bytes":
            right = value % 4096 == 0
        if not right:
            return f"{name} is {value!r}"
    return ""


def _version() -> str:
    try:
        return version("moeinf")
    except PackageNotFoundError:
        return "unknown"
