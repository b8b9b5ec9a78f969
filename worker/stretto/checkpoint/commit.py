"""Rank 0's part of a save: the ranks' shares become one checkpoint, conditional on the generation; older ones go."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from stretto.checkpoint.catalogue import Catalogue
from stretto.checkpoint.errors import Abandoned, CheckpointFailed, Conflict, Damaged, Fenced
from stretto.checkpoint.index import Index, check_coverage, failure_name, index_name, ranks_among
from stretto.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from stretto.checkpoint.name import CheckpointName, check_position, fence_generation, fence_name
from stretto.checkpoint.retention import Found, must_be_read, superfluous, to_verify
from stretto.checkpoint.store import Store

_log = logging.getLogger(__name__)

_JOB = "job.json"
_POLL_S = (0.005, 0.25)  # for shares: shortest and longest pause


@dataclass(frozen=True)
class Rules:
    """keep, keep_every_tau: what is not deleted. job: whose folder it is; "": anybody's."""

    keep: int = 3
    keep_every_tau: float | None = None
    job: str = ""

    def validate(self) -> None:
        """Raise ValueError for a value that makes no sense."""
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise ValueError(f"keep is {self.keep!r}; allowed: whole numbers from 1")
        if self.keep_every_tau is not None and not self.keep_every_tau > 0:
            raise ValueError(f"keep_every_tau is {self.keep_every_tau!r}; allowed: None, or a number above 0")


class Committer:
    """Whoever commits holds no lock: it checks the fence, writes the manifest, and checks the fence again.

    A generation that raised its fence in between sees the manifest or not, and the committer is told that it is
    fenced; where it is not told, whoever fences later sees the manifest.
    """

    def __init__(self, store: Store, rules: Rules, *, shares_limit_s: float) -> None:
        self._store = store
        self._rules = rules
        self._shares_limit_s = shares_limit_s
        self._catalogue = Catalogue(store)
        self._found: dict[CheckpointName, Found] = {}
        self._known: set[CheckpointName] | None = None  # committed ones, by this run or before it
        self._leftovers: set[CheckpointName] = set()
        self._fenced = 0  # the latest fence that this process raised

    def open(self) -> None:
        """Claim the folder for the job and see what it holds, unless that was done before."""
        if self._known is not None:
            return
        self._store.make("")
        if self._rules.job:
            self._claim(self._rules.job)
        self.look_around()

    def look_around(self) -> None:
        """What is there now belongs to this run's past."""
        names = self._catalogue.newest_first()
        self._known = {name for name in names if self._catalogue.committed(name)}
        self._leftovers |= set(names) - self._known

    def note_verified(self, name: CheckpointName, tau: float, *, read: bool = True) -> None:
        """Every byte of it was seen to be right: as it was read, or else as it was written."""
        self._found[name] = Found(name, tau, whole=True, verified=True, read=read)

    def must_be_read(self, name: CheckpointName) -> bool:
        """Whether what is about to be written under this name is to be read again. Asks no store."""
        rules, found = self._rules, list(self._found.values())
        return must_be_read(name, found, keep=rules.keep, keep_every_tau=rules.keep_every_tau)

    def note_damaged(self, name: CheckpointName) -> None:
        """Something is wrong with it."""
        self._found[name] = Found(name, 0.0, whole=False, verified=False, read=False)

    def raise_fence(self, generation: int) -> None:
        """Refuse commits of older generations from now on. Raises Fenced where a newer one has begun."""
        check_position(generation=generation)
        self.open()
        self._check_fence(generation)
        self._store.create(fence_name(generation), b"")
        for name in self._store.names():
            older = fence_generation(name)
            if older is not None and older < generation:
                self._store.remove(name)
        self._store.sync()
        self._fenced = generation

    def begin(self, name: CheckpointName, *, fences: bool) -> None:
        """Refuse early what could not be committed later. fences: raise the fence first, once per generation."""
        if fences and name.generation > self._fenced:
            self.raise_fence(name.generation)
        self.open()
        self._check_fence(name.generation)
        self._leftovers.add(name)  # until it is committed

    def commit(
        self, name: CheckpointName, *, tau: float, world_size: int, read: bool, cancelled: Callable[[], bool]
    ) -> Manifest:
        """Wait for the ranks' shares, then make them a checkpoint. Raises CheckpointFailed, Conflict, Fenced.

        read: the ranks have read what they wrote.
        """
        files = self._gather(name, world_size, cancelled)
        manifest = Manifest(name.generation, name.step, name.save, tau, world_size, self._rules.job, time.time(), files)
        self._check_fence(name.generation)
        self._check_conflict(name)
        self._store.write(f"{name}/{MANIFEST}", [manifest.encode()])
        self._store.sync(str(name))
        try:
            self._check_fence(name.generation)
        except Fenced:
            self._store.remove(f"{name}/{MANIFEST}")
            raise
        assert self._known is not None, "opened when the save began"
        self._known.add(name)
        self._leftovers.discard(name)
        self.note_verified(name, tau, read=read)
        self._tidy_up(name)
        return manifest

    def discard(self, name: CheckpointName) -> None:
        """Delete what was written of a save that failed."""
        self._store.remove_folder(str(name), first=MANIFEST)

    def _gather(self, name: CheckpointName, world_size: int, cancelled: Callable[[], bool]) -> dict[str, FileEntry]:
        limit_s, pause_s = time.monotonic() + self._shares_limit_s, _POLL_S[0]
        while len(there := ranks_among(names := self._store.names(str(name)))) < world_size:
            for rank in range(world_size):
                if failure_name(rank) in names:
                    reason = self._store.read(f"{name}/{failure_name(rank)}").decode(errors="replace")
                    raise CheckpointFailed(f"rank {rank} could not write its share: {reason}")
            if cancelled():
                raise Abandoned
            if time.monotonic() > limit_s:
                missing = ", ".join(map(str, sorted(set(range(world_size)) - there)))
                raise CheckpointFailed(
                    f"the shares of ranks {missing} did not come within {self._shares_limit_s:g} s: do all nodes see "
                    f"{self._store.url}?"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_S[1])
        indices, files = [], {}
        for rank in range(world_size):
            data = self._store.read(f"{name}/{index_name(rank)}")
            indices.append(Index.decode(data, index_name(rank)))
            files.update(indices[-1].files)
            files[index_name(rank)] = FileEntry.of(data)
        check_coverage(indices)
        names = self._store.names(str(name))
        wrong = [file for file, entry in files.items() if names.get(file) != entry.size_bytes]
        if wrong:
            raise CheckpointFailed(f"{', '.join(wrong)} at {self._store.at(str(name))} changed after it was written")
        return files

    def _check_fence(self, generation: int) -> None:
        fences = (fence_generation(name) for name in self._store.names())
        fence = max((each for each in fences if each is not None), default=0)
        if generation < fence:
            raise Fenced(
                f"generation {generation} may not save into {self._store.url}: generation {fence} has begun there; "
                "rejoin the job and load its newest checkpoint. If the controller has lost its data, "
                "numbers began anew: copy what you need and give another folder"
            )

    def _check_conflict(self, name: CheckpointName) -> None:
        """A commit of this generation that is not ours is another run's."""
        for other in self._catalogue.newest_first():
            if other.generation != name.generation or other in (self._known or ()) or other == name:
                continue
            if self._catalogue.committed(other):
                raise Conflict(
                    f"another run has saved {other} into {self._store.url} meanwhile: nothing was overwritten; give "
                    "each run a folder of its own"
                )

    def _claim(self, job: str) -> None:
        body = json.dumps({"job": job}).encode()
        if self._store.create(_JOB, body):
            return
        data = self._store.read(_JOB)
        said = _owner(data)
        owner = said or (self._saved_by() if data else None) or job  # none: a crash in the middle of the first claim
        if owner == job and said is None:
            self._store.write(_JOB, [body])
        elif owner != job:
            raise Conflict(
                f"{self._store.url} holds the checkpoints of job {owner}, and this is job {job}: nothing was changed; "
                "give each job a folder of its own"
            )

    def _saved_by(self) -> str | None:
        """Whose the newest checkpoint is that says so: the claim is damaged."""
        for name in self._catalogue.newest_first():
            with contextlib.suppress(Damaged):
                if job := self._catalogue.manifest(name).job:
                    return job
        return None

    def _tidy_up(self, saved: CheckpointName) -> None:
        """Delete what is superfluous; what cannot be deleted is no reason to fail."""
        try:
            rules, found = self._rules, self._look_at_all()
            if (name := to_verify(found, keep=rules.keep)) is not None:  # one per save: reading takes its time
                whole = bool(self._catalogue.verify(name))
                self._found[name] = Found(name, self._found[name].tau, whole=whole, verified=whole, read=whole)
                found = self._look_at_all()
            doomed = superfluous(found, keep=rules.keep, keep_every_tau=rules.keep_every_tau)
            doomed += [name for name in self._catalogue.newest_first() if self._is_leftover(name, saved)]
            for name in doomed:
                self.discard(name)
                self._found.pop(name, None)
                self._leftovers.discard(name)
        except OSError as error:
            _log.warning("old checkpoints in %s could not be deleted: %s", self._store.url, error)

    def _look_at_all(self) -> list[Found]:
        names = (name for name in self._catalogue.newest_first() if name not in self._leftovers)
        return [each for name in names if (each := self._look_at(name)) is not None]

    def _look_at(self, name: CheckpointName) -> Found | None:
        if name not in self._found:
            if not self._catalogue.committed(name):
                return None
            try:
                tau = self._catalogue.manifest(name).tau
                self._found[name] = Found(name, tau, whole=True, verified=False, read=False)
            except Damaged:
                self.note_damaged(name)
        return self._found[name]

    def _is_leftover(self, name: CheckpointName, saved: CheckpointName) -> bool:
        """Nobody is still writing it: it is of an older generation, or was there before this run, or is our own."""
        if name not in self._leftovers and name.generation >= saved.generation:
            return False
        return name != saved and not self._catalogue.committed(name)


def _owner(data: bytes) -> str | None:
    try:
        owner = json.loads(data)["job"]
    except (ValueError, KeyError, TypeError):
        return None
    return owner if isinstance(owner, str) else None
