"""`Checkpointer`: asynchronous, sharded over the ranks, whole or absent, fenced, verified."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.planner import SavePlan

from stretto.checkpoint.background import BackgroundSave, Failed, Saved
from stretto.checkpoint.catalogue import Catalogue, Verification
from stretto.checkpoint.commit import Committer, Rules
from stretto.checkpoint.errors import CheckpointFailed, Conflict, Damaged, Fenced, reason_of
from stretto.checkpoint.index import Index
from stretto.checkpoint.loading import Contents, distribute
from stretto.checkpoint.manifest import Manifest
from stretto.checkpoint.name import SAVE_LIMIT, CheckpointName, check_position
from stretto.checkpoint.pace import Pace
from stretto.checkpoint.peers import Peers, present_peers
from stretto.checkpoint.settings import CheckpointSettings
from stretto.checkpoint.shard_writer import ShardWriter
from stretto.checkpoint.share import SharePlanner
from stretto.checkpoint.snapshot import Snapshot, form_of
from stretto.checkpoint.staging import Staged, Staging
from stretto.checkpoint.store import Store

_log = logging.getLogger(__name__)

_LOOK_S = 0.05  # how often one who waits asks whether to go on waiting


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that was not loaded, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class CheckpointInfo:
    """What was loaded, and which newer ones were not whole."""

    step: int
    generation: int
    tau: float
    path: str
    passed_over: tuple[PassedOver, ...] = ()


class Checkpointer:
    """Saves and loads checkpoints in one place, which the ranks of a job share.

    `url`: a path, or any URL that fsspec knows; all ranks see the same files there. `keep`: so many of the newest
    whole checkpoints stay; `keep_every_tau`: and the first one at each multiple of it. `job`: whose place it is;
    another job's checkpointer is refused. `peers`: the ranks that save together; torch's default process group, if
    there is one, unless `join` says otherwise.

    A state is a dict from names to objects with state_dict() and load_state_dict(), or to plain nested values. All
    ranks call `save`, `begin` and `load_latest` together, with the same names. A process that is killed at any moment
    leaves the previous checkpoint loadable.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_every_tau: float | None = None,
        job: str = "",
        peers: Peers | None = None,
        settings: CheckpointSettings | None = None,
    ) -> None:
        self.settings = settings or CheckpointSettings()
        self.settings.validate()
        rules = Rules(keep, keep_every_tau, job)
        rules.validate()
        self._store = Store(url)
        self._peers = peers
        self._catalogue = Catalogue(self._store, threads=self.settings.read_threads)
        self._committer = Committer(self._store, rules, shares_limit_s=self.settings.shares_limit_s)
        self._staging = Staging(self.settings.copy_threads)
        self._running: BackgroundSave | None = None
        self._failures = 0

    @property
    def url(self) -> str:
        return self._store.url

    def join(self, peers: Peers) -> None:
        """Save with these ranks from here on. A save that is still running may end, and nobody hears of it."""
        self._peers = peers
        if self._running is not None:
            self._running.stale = True

    # -- saving
    # ----------------------------------------------------------------------------------------------

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Find memory for this rank's share of such a state, in the background; otherwise the first save does."""
        if not self.busy:
            peers = self._present_peers()
            writer = self._writer(CheckpointName(0, 0), peers.rank, Pace(None), read_back=False)
            self._staging.prepare(*self._plan(Snapshot(state, peers.rank), writer, peers))

    def save(
        self, state: Mapping[str, Any], *, step: int, generation: int = 0, tau: float = 0.0, fences: bool = False
    ) -> str:
        """Write a checkpoint and return its path; rank 0's is on disk, and whole, when this returns.

        fences: generations before this one may save no more from here on.
        Raises CheckpointFailed, Fenced where `fence` was called for a newer generation, also while this was writing.
        """
        self.wait()
        self.poll()
        if not self.begin(state, step=step, generation=generation, tau=tau, fences=fences, urgent=True):
            raise CheckpointFailed("another rank has not ended its previous save: call save on all ranks together")
        self.wait()
        outcome = self._ended()
        if isinstance(outcome, Failed):
            if isinstance(outcome.error, Fenced | Conflict):
                raise outcome.error
            raise CheckpointFailed(f"no checkpoint of step {step}: {outcome.reason}") from outcome.error
        assert outcome is not None, "nobody abandons it meanwhile"
        return outcome.path

    def begin(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        generation: int = 0,
        tau: float = 0.0,
        fences: bool = False,
        urgent: bool = False,
    ) -> bool:
        """Copy this rank's share and write it in the background; `poll` tells how it ended.

        False, and nothing begun, while some rank's previous save is running. Raises ValueError, naming the place, for
        what cannot be stored. urgent: training will wait for it, so it takes more of the machine.
        """
        check_position(generation=generation, step=step)
        peers = self._present_peers()
        if self._running is not None and self._running.stale:
            self._running.abandon()
        busy = self.busy
        mine = secrets.randbelow(SAVE_LIMIT) if peers.rank == 0 else 0
        first = peers.rank == 0
        read_back = first and self.settings.read_back and self._committer.must_be_read(CheckpointName(generation, step))
        save, others_busy, wanted = peers.add_up([mine, int(busy), int(read_back)])
        if others_busy:
            return False
        name = CheckpointName(generation, step, save)
        pace = Pace(None if urgent else self.settings.write_share)
        writer = self._writer(name, peers.rank, pace, read_back=bool(wanted))
        staged = self._stage(Snapshot(state, peers.rank), name, peers, writer)

        def write() -> None:
            if first:
                self._committer.begin(name, fences=fences)
            _write(writer, staged)

        def commit() -> Manifest | None:
            if not first:
                return None
            read = bool(wanted) or not self.settings.read_back
            return self._committer.commit(
                name, tau=tau, world_size=peers.world_size, read=read, cancelled=lambda: pace.cancelled
            )

        self._running = BackgroundSave(
            self._store,
            self._committer if first else None,
            name,
            peers.rank,
            write=write,
            commit=commit,
            tau=tau,
            pace=pace,
        )
        return True

    @property
    def busy(self) -> bool:
        """A save is running on this rank."""
        return self._running is not None and self._running.running

    def poll(self) -> Saved | Failed | None:
        """How a background save has ended since the last call; None where there is no news.

        Raises Fenced and Conflict, which no further attempt would mend, and CheckpointFailed once more saves in a row
        have failed than settings.failures_allowed.
        """
        outcome = self._ended()
        if isinstance(outcome, Saved):
            self._failures = 0
        elif isinstance(outcome, Failed):
            if isinstance(outcome.error, Fenced | Conflict):
                raise outcome.error
            self._failures += 1
            _log.warning("no checkpoint of step %d: %s", outcome.step, outcome.reason)
            if self._failures > self.settings.failures_allowed:
                raise CheckpointFailed(
                    f"{self._failures} saves in a row have failed; the latest, of step {outcome.step}: {outcome.reason}"
                ) from outcome.error
        return outcome

    def wait(self, limit_s: float | None = None, *, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the save that is running, if there is one; whether none is running any more.

        given_up(): asked meanwhile; where it says so, the save is abandoned.
        """
        until_s = float("inf") if limit_s is None else time.monotonic() + limit_s
        while self._running is not None and not self._running.wait(_LOOK_S):
            if given_up():
                self.abandon()
            if time.monotonic() > until_s:
                return False
        return True

    def abandon(self) -> None:
        """Give up the save that is running, without harm: peers that are gone will not write their share."""
        if self._running is not None:
            self._running.stale = True
            self._running.abandon()

    def fence(self, generation: int) -> None:
        """Refuse saves of generations below this one from now on, by any process.

        The first act of a generation that starts from a checkpoint. Raises Fenced where a newer one has begun, and
        Conflict where the place is another job's.
        """
        check_position(generation=generation)
        try:
            self._committer.raise_fence(generation)
        except OSError as error:
            raise CheckpointFailed(reason_of(error, self.url)) from error

    # -- loading
    # ---------------------------------------------------------------------------------------------

    def load_latest(self, state: dict[str, Any]) -> CheckpointInfo | None:
        """Load the newest whole checkpoint into `state`; None, and nothing changed, where there is none.

        Objects get load_state_dict(); plain values are replaced in the dict. Newest means the highest generation, then
        the highest step. Raises ValueError for the checkpoint of another model, with all differences, and
        CheckpointFailed where there are checkpoints, and none is whole.
        """
        peers = self._present_peers()
        passed_over: list[PassedOver] = []
        committed = False
        for name in self._candidates(peers):
            contents, trouble = None, ""
            try:
                contents = Contents(self._store, name)
                contents.check_against(state)
                values = contents.read(state, peers.rank, peers.world_size, threads=self.settings.read_threads)
            except Damaged as damage:
                trouble = str(damage)
            except OSError as error:
                trouble = reason_of(error, self.url)
            if peers.add_up([int(bool(trouble))])[0]:
                reason = trouble or "another rank found it damaged"
                passed_over.append(PassedOver(self._store.at(str(name)), reason))
                committed = committed or self._catalogue.committed(name)
                self._committer.note_damaged(name)
                _log.warning("checkpoint %s passed over: %s", name, reason)
                continue
            assert contents is not None, "it was read"
            distribute(values, state, threads=self.settings.copy_threads)
            tau = contents.manifest.tau
            self._committer.note_verified(name, tau)
            return CheckpointInfo(name.step, name.generation, tau, self._store.at(str(name)), tuple(passed_over))
        if committed:
            reasons = "; ".join(f"{each.path}: {each.reason}" for each in passed_over)
            raise CheckpointFailed(
                f"no checkpoint in {self.url} is whole ({reasons}): to begin anew all the same, give another folder"
            )
        return None

    def verify(self, path: str | os.PathLike[str]) -> Verification:
        """Say whether every byte of a checkpoint is as it was written, and if not, what is wrong."""
        name = CheckpointName.parse(os.fspath(path).rstrip("/").rsplit("/", 1)[-1])
        if name is None:
            raise ValueError(f"{path} is no checkpoint; `stretto checkpoints list {self.url}` shows those that exist")
        return self._catalogue.verify(name)

    # -- parts
    # -----------------------------------------------------------------------------------------------

    def _present_peers(self) -> Peers:
        return self._peers if self._peers is not None else present_peers()

    def _candidates(self, peers: Peers) -> Iterator[CheckpointName]:
        """Rank 0's checkpoints, newest first, on every rank."""
        names: list[CheckpointName] = []
        trouble = ""
        if peers.rank == 0:
            try:
                self._committer.look_around()
                names = self._catalogue.newest_first()
            except OSError as error:
                trouble = reason_of(error, self.url)
        while True:
            mine = [1, names[0].generation, names[0].step, names[0].save] if names else [0, 0, 0, 0]
            another, generation, step, save, failed = peers.add_up([*mine, int(bool(trouble))])
            if failed:
                raise CheckpointFailed(trouble or f"rank 0 cannot list what is at {self.url}")
            if not another:
                return
            yield CheckpointName(generation, step, save)
            names = names[1:]

    def _stage(self, snapshot: Snapshot, name: CheckpointName, peers: Peers, writer: ShardWriter) -> Staged:
        """This rank's share, copied."""
        plan, planner = self._plan(snapshot, writer, peers)
        index = Index(
            rank=peers.rank,
            save=name.save,
            files={},
            tensors={tensor: form_of(each) for tensor, each in snapshot.tensors.items()},
            chunks=(),
            tree=snapshot.tree if peers.rank == 0 else None,
            own=snapshot.own,
        )
        return self._staging.copy(plan, planner, index)

    def _writer(self, name: CheckpointName, rank: int, pace: Pace, *, read_back: bool) -> ShardWriter:
        return ShardWriter(self._store, str(name), rank, settings=self.settings, pace=pace, read_back=read_back)

    def _plan(self, snapshot: Snapshot, writer: ShardWriter, peers: Peers) -> tuple[SavePlan, SharePlanner]:
        """What this rank writes, laid out as files."""
        item_bytes = self.settings.part_bytes
        planner = SharePlanner(peers.rank, peers.world_size, owners=snapshot.owners, item_bytes=item_bytes)
        planner.set_up_planner(snapshot.tensors)
        return writer.prepare_local_plan(planner.create_local_plan()), planner

    def _ended(self) -> Saved | Failed | None:
        if self._running is None or self._running.running:
            return None
        ended, self._running = self._running, None
        return None if ended.stale else ended.outcome


def _write(writer: ShardWriter, staged: Staged) -> None:
    """What torch.distributed.checkpoint.save does, but for the collectives."""
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = staged.create_global_plan([staged.create_local_plan()])
    plan = staged.finish_plan(plans[0])
    writer.finish(metadata, [writer.write_data(plan, staged).value()])
