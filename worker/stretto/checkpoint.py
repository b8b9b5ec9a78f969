"""Checkpoints that are whole or absent, fenced by generation, and fall back to the newest that verifies."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from stretto import checkpoint_files as files
from stretto.checkpoint_files import CheckpointName, Verification
from stretto.errors import Rejoin

_log = logging.getLogger(__name__)

_TEMPORARY = ".incomplete-"
_FENCE = re.compile(r"fence-(\d{10})")


class Fenced(Rejoin):
    """A newer generation has begun: this one may not save any more."""


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that was not loaded, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class CheckpointInfo:
    """What was loaded, and which newer ones were not whole."""

    step: int
    generation: int
    path: Path
    passed_over: tuple[PassedOver, ...] = ()


class Checkpointer:
    """Saves and loads checkpoints in one directory, which several processes may share.

    `url`: a path or a file:// URL. `keep`: so many of the newest whole checkpoints stay.

    A state is a dict from names to objects with state_dict() and load_state_dict(), or to plain nested
    values. One process saves at a time, such as rank 0; one that is killed at any moment leaves the previous
    checkpoint loadable.
    """

    def __init__(self, url: str | os.PathLike[str], *, keep: int = 3) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep is {keep!r}; allowed: whole numbers from 1")
        self._root = _local_directory(url)
        self._keep = keep
        self._verified: set[Path] = set()  # by this process; only old checkpoints are deleted on its strength
        self._root.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._remove_leftovers()

    def save(self, state: dict[str, Any], *, step: int, generation: int = 0) -> Path:
        """Write a checkpoint and return its path; it is on disk when this returns.

        Raises Fenced where `fence` was called for a newer generation, also while this was writing.
        """
        _check_position(step=step, generation=generation)
        collected = {name: _collect(value) for name, value in state.items()}
        with self._lock():
            self._check_fence(generation)
            self._remove_leftovers()
            temporary, claim = self._claim_temporary()
        try:
            files.write(temporary, collected, generation=generation, step=step)
            with self._lock():
                self._check_fence(generation)
                path = self._root / str(self._free_name(generation, step))
                temporary.rename(path)
                files.sync_directory(self._root)
                self._verified.add(path)
                self._prune(saved=path)
        finally:
            os.close(claim)
            shutil.rmtree(temporary, ignore_errors=True)  # gone already where the save succeeded
        return path

    def load_latest(self, state: dict[str, Any]) -> CheckpointInfo | None:
        """Load the newest whole checkpoint into `state`; None, and nothing changed, where there is none.

        Objects get load_state_dict(); plain values are replaced in the dict. Newest means the highest
        generation, then the highest step.
        """
        passed_over: list[PassedOver] = []
        for path in self._newest_first():
            verification = self.verify(path)
            if not verification:
                passed_over.append(PassedOver(path, verification.reason))
                _log.warning("checkpoint %s passed over: %s", path.name, verification.reason)
                continue
            try:
                saved = files.read(path)
            except OSError as error:  # another process has deleted it just now
                passed_over.append(PassedOver(path, f"cannot be read: {error}"))
                continue
            self._verified.add(path)
            _distribute(saved, state, path)
            name = CheckpointName.parse(path.name)
            assert name is not None
            return CheckpointInfo(name.step, name.generation, path, tuple(passed_over))
        if passed_over:
            _log.error("none of the %d checkpoints in %s is whole", len(passed_over), self._root)
        return None

    def verify(self, path: str | os.PathLike[str]) -> Verification:
        """Say whether every byte of a checkpoint is as it was written, and if not, what is wrong."""
        return files.verify(Path(path))

    def fence(self, generation: int) -> None:
        """Refuse saves of generations below this one from now on, by any process.

        The first act of a generation that starts from a checkpoint. Raises Fenced where a newer one has
        begun.
        """
        _check_position(generation=generation)
        with self._lock():
            self._check_fence(generation)
            (self._root / f"fence-{generation:010d}").touch()
            for old in self._fences():
                if old < generation:
                    (self._root / f"fence-{old:010d}").unlink()
            files.sync_directory(self._root)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Exclude other processes; the kernel lets go of the lock of one that dies."""
        with (self._root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _fences(self) -> list[int]:
        matches = (_FENCE.fullmatch(name) for name in os.listdir(self._root))
        return [int(match[1]) for match in matches if match]

    def _check_fence(self, generation: int) -> None:
        fence = max(self._fences(), default=0)
        if generation < fence:
            raise Fenced(
                f"generation {generation} may not save into {self._root}: generation {fence} has begun there; "
                "rejoin the job and load its newest checkpoint. If the controller has lost its data, "
                "numbers began anew: copy what you need and give another folder"
            )

    def _claim_temporary(self) -> tuple[Path, int]:
        """Make a temporary directory and a lock on it that shows that its writer lives."""
        path = self._root / f"{_TEMPORARY}{secrets.token_hex(8)}"
        path.mkdir()
        claim = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(claim, fcntl.LOCK_EX)
        return path, claim

    def _remove_leftovers(self) -> None:
        for path in self._root.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                claim = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                except BlockingIOError:
                    pass  # its writer is at work
                finally:
                    os.close(claim)

    def _newest_first(self) -> list[Path]:
        names = (CheckpointName.parse(name) for name in os.listdir(self._root))
        return [self._root / str(name) for name in sorted((n for n in names if n), reverse=True)]

    def _free_name(self, generation: int, step: int) -> CheckpointName:
        """The step may have been saved before, then went back to an older checkpoint and came here again."""
        taken = (CheckpointName.parse(path.name) for path in self._newest_first())
        attempts = [name.attempt for name in taken if name and (name.generation, name.step) == (generation, step)]
        return CheckpointName(generation, step, max(attempts, default=-1) + 1)

    def _prune(self, *, saved: Path) -> None:
        """Delete what is older than the `keep` newest whole checkpoints; never the one just saved."""
        whole = 0
        for path in self._newest_first():
            if whole >= self._keep and path != saved:
                # Renamed first, so that a kill in the middle leaves a leftover and not half a checkpoint.
                doomed = path.rename(self._root / f"{_TEMPORARY}{path.name}")
                shutil.rmtree(doomed, ignore_errors=True)
                self._verified.discard(path)
            elif path in self._verified or self.verify(path):
                self._verified.add(path)
                whole += 1


def _local_directory(url: str | os.PathLike[str]) -> Path:
    text = os.fspath(url)
    scheme, separator, _ = text.partition("://")
    if not separator:
        return Path(text).absolute()
    parts = urlsplit(text)
    if scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ValueError(f"checkpoint url is {text!r}; allowed: a local path or file:///path")
    return Path(unquote(parts.path))


def _check_position(**numbers: int) -> None:
    for name, value in numbers.items():
        limit = 10**12 if name == "step" else 10**10  # digits in the directory's name
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise ValueError(f"{name} is {value!r}; allowed: whole numbers from 0 to {limit - 1}")


def _collect(value: Any) -> Any:
    return value.state_dict() if callable(getattr(value, "state_dict", None)) else value


def _distribute(saved: dict[str, Any], state: dict[str, Any], path: Path) -> None:
    missing = sorted(state.keys() - saved.keys())
    if missing:
        raise ValueError(
            f"checkpoint {path} lacks {', '.join(missing)}; it holds {', '.join(sorted(saved)) or 'nothing'}: "
            "ask for what it holds, or start without it"
        )
    for name, value in state.items():
        if callable(getattr(value, "load_state_dict", None)):
            value.load_state_dict(saved[name])
        else:
            state[name] = saved[name]
