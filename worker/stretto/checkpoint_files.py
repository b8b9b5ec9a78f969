"""One checkpoint directory: writes it so that it is whole or absent, and tells whether it is whole.

A checkpoint is `tensors.safetensors`, `state.json`, and `manifest.json`, which is written last and names the
other files with size and sha256, the generation and the step, and its own checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from stretto.plain_tree import TreeEncoder, decode

FORMAT_VERSION = 1
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"

_NAME = re.compile(r"generation-(\d{10})-step-(\d{12})-try-(\d{4})")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, order=True)
class CheckpointName:
    """Where a checkpoint stands among the others; a later `attempt` is a second save of the same step."""

    generation: int
    step: int
    attempt: int = 0

    def __str__(self) -> str:
        return f"generation-{self.generation:010d}-step-{self.step:012d}-try-{self.attempt:04d}"

    @classmethod
    def parse(cls, name: str) -> CheckpointName | None:
        """Return the position that a directory name says, or None for the name of something else."""
        match = _NAME.fullmatch(name)
        return cls(*(int(part) for part in match.groups())) if match else None


@dataclass(frozen=True)
class Verification:
    """Whether a checkpoint is whole; true in an `if`. `reason` says what is wrong."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


def write(directory: Path, state: dict[str, Any], *, generation: int, step: int) -> None:
    """Write a checkpoint into an empty directory and wait until the disk has it."""
    encoder = TreeEncoder()
    tree = encoder.encode(state, "state")
    (directory / STATE).write_text(json.dumps(tree, allow_nan=False))
    save_file(encoder.tensors, directory / TENSORS)
    (directory / TENSORS).chmod((directory / STATE).stat().st_mode)  # safetensors keeps its files to their owner
    files = {}
    for name in (STATE, TENSORS):
        _sync(directory / name)
        files[name] = {
            "size_bytes": (directory / name).stat().st_size,
            "sha256": _file_sha256(directory / name),
        }
    body = {"format_version": FORMAT_VERSION, "generation": generation, "step": step, "files": files}
    (directory / MANIFEST).write_text(json.dumps({**body, "sha256": _body_sha256(body)}, indent=1))
    _sync(directory / MANIFEST)
    sync_directory(directory)


def read(directory: Path) -> dict[str, Any]:
    """Return the state of a checkpoint that `verify` has passed; tensors are on the CPU."""
    tensors = load_file(directory / TENSORS)
    state: dict[str, Any] = decode(json.loads((directory / STATE).read_text()), tensors)
    return state


def verify(directory: Path) -> Verification:
    """Read every byte of a checkpoint and compare it with the manifest."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        if manifest.get("sha256") != _body_sha256(body):
            return Verification(False, f"{MANIFEST} does not match its own checksum")
        if body["format_version"] != FORMAT_VERSION:
            version = body["format_version"]
            return Verification(False, f"format version {version}; this release reads {FORMAT_VERSION}")
        name = CheckpointName.parse(directory.name)
        if name is not None and (name.generation, name.step) != (body["generation"], body["step"]):
            return Verification(False, f"{MANIFEST} is of generation {body['generation']}, step {body['step']}")
        for file, expected in body["files"].items():
            size_bytes = (directory / file).stat().st_size
            if size_bytes != expected["size_bytes"]:
                return Verification(False, f"{file} has {size_bytes} bytes instead of {expected['size_bytes']}")
            if _file_sha256(directory / file) != expected["sha256"]:
                return Verification(False, f"{file} does not match its checksum")
    except FileNotFoundError as error:
        return Verification(False, f"{Path(error.filename).name} is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Verification(False, f"{MANIFEST} cannot be read: {error}")
    return Verification(True)


def sync_directory(directory: Path) -> None:
    """Wait until the disk has the directory's entries."""
    _sync(directory, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int = os.O_RDONLY) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _body_sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
