"""The manifest: written last, it says which files belong to a checkpoint and what their bytes are."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from xxhash import xxh3_64_hexdigest

from stretto.checkpoint.errors import Damaged
from stretto.checkpoint.name import CheckpointName, check_position

MANIFEST = "manifest.json"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class FileEntry:
    """One file's size and the XXH3-64 of its bytes, in hexadecimal digits."""

    size_bytes: int
    xxh3: str

    @classmethod
    def of(cls, data: bytes) -> FileEntry:
        return cls(len(data), xxh3_64_hexdigest(data))


@dataclass(frozen=True)
class Manifest:
    """`save`: as in the folder's name. `created_s`: wall-clock time, for display only."""

    generation: int
    step: int
    save: int
    tau: float
    world_size: int
    job: str
    created_s: float
    files: dict[str, FileEntry]
    format_version: int = FORMAT_VERSION

    @property
    def size_bytes(self) -> int:
        """Of all files, but for the manifest itself."""
        return sum(entry.size_bytes for entry in self.files.values())

    def encode(self) -> bytes:
        body = asdict(self)
        return json.dumps({**body, "xxh3": _checksum(body)}, indent=1, allow_nan=False).encode()

    @classmethod
    def decode(cls, data: bytes, name: CheckpointName | None) -> Manifest:
        """Read a manifest; Damaged says what is wrong with it. name: of the folder that it was found in."""
        try:
            body = json.loads(data)
            checksum = body.pop("xxh3")
            if checksum != _checksum(body):
                raise Damaged(f"{MANIFEST} does not match its own checksum")
            version = body["format_version"]
            if version != FORMAT_VERSION:
                raise Damaged(
                    f"format version {version}; this release reads {FORMAT_VERSION}: use the release that wrote it"
                )
            files = {str(file): FileEntry(**entry) for file, entry in body.pop("files").items()}
            manifest = cls(files=files, **body)
            _check(manifest)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"{MANIFEST} cannot be read: {error}") from error
        if any("/" in file or file in ("", ".", "..") for file in manifest.files):
            raise Damaged(f"{MANIFEST} names files outside of its folder")
        position = CheckpointName(manifest.generation, manifest.step, manifest.save)
        if name is not None and name != position:
            raise Damaged(f"{MANIFEST} is that of {position}: somebody renamed the folder")
        return manifest


def _check(manifest: Manifest) -> None:
    """Raise ValueError for what nobody wrote."""
    check_position(generation=manifest.generation, step=manifest.step)
    for name, value, kinds in (
        ("tau", manifest.tau, (int, float)),
        ("created_s", manifest.created_s, (int, float)),
        ("job", manifest.job, (str,)),
        ("world_size", manifest.world_size, (int,)),
        ("save", manifest.save, (int,)),
        *((f"the size of {file}", entry.size_bytes, (int,)) for file, entry in manifest.files.items()),
    ):
        if type(value) not in kinds:
            raise ValueError(f"{name} is {value!r}")
    if not 1 <= manifest.world_size <= len(manifest.files):
        raise ValueError(f"world_size is {manifest.world_size}, with {len(manifest.files)} files")


def _checksum(body: dict[str, Any]) -> str:
    return xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())
