"""A run as its checkpoints tell it: the newest holds its chronicle, and each when it was written."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from stretto_proto.v1 import jobs_pb2, types_pb2

from stretto.checkpoint.catalogue import Catalogue
from stretto.checkpoint.errors import CheckpointFailed, Damaged
from stretto.checkpoint.loading import Contents
from stretto.checkpoint.manifest import Manifest
from stretto.checkpoint.name import CheckpointName
from stretto.checkpoint.store import Store
from stretto.chronicle import Chronicle, Point
from stretto.plain_tree import decode
from stretto.report.run import Run

_ENTRY = "chronicle"
# d(tau)/dt is taken over so many points on: between two neighbours it would jump.
_RATE_POINTS = 4


def from_checkpoints(url: str) -> Run:
    """The run whose checkpoints are in this folder. Raises CheckpointFailed where none is whole."""
    store = Store(url)
    manifests, events = _manifests(store)
    newest, chronicle = _newest(store, list(manifests))
    manifest = manifests[newest]
    points = list(chronicle or ()) or [_point(each) for each in manifests.values()]
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created_s))
    job = jobs_pb2.Job(
        name=manifest.job or url.rstrip("/").rpartition("/")[2],
        phase="saved",
        reason=f"its newest checkpoint was written at {written}, by {manifest.world_size} workers",
        spec=types_pb2.JobSpec(target_tau=chronicle.target_tau if chronicle else 0.0),
        progress=types_pb2.Progress(step=manifest.step, tau=manifest.tau, generation=manifest.generation),
    )
    return Run(f"the checkpoints in {store.url}", job, _listed(points), _generations(points), events)


def _manifests(store: Store) -> tuple[dict[CheckpointName, Manifest], list[jobs_pb2.Event]]:
    """Of all checkpoints that are there, oldest first, with what is to be told of each."""
    catalogue = Catalogue(store)
    manifests, events = {}, []
    for name in reversed(catalogue.newest_first()):
        try:
            manifest = catalogue.manifest(name)
        except Damaged as damage:
            events.append(jobs_pb2.Event(kind="not_whole", reason=f"{name}: {damage}", generation=name.generation))
            continue
        manifests[name] = manifest
        reason = f"step {manifest.step}, tau {manifest.tau:.1f}: {manifest.size_bytes / 1e6:.3g} MB in {name}"
        events.append(
            jobs_pb2.Event(
                time_s=manifest.created_s, kind="checkpoint_committed", reason=reason, generation=name.generation
            )
        )
    if not manifests:
        raise CheckpointFailed(f"{store.url} holds no whole checkpoint: name the folder of a job's checkpoints")
    return manifests, events


def _newest(store: Store, names: list[CheckpointName]) -> tuple[CheckpointName, Chronicle | None]:
    """The newest checkpoint, and the newest chronicle that can be read; a loop of one's own saves none."""
    for name in reversed(names):
        try:
            tree = Contents(store, name).tree
            if _ENTRY in tree:
                return names[-1], Chronicle.saved(decode(tree[_ENTRY], {}))
        except (Damaged, ValueError, KeyError, TypeError):
            continue
    return names[-1], None


def _point(manifest: Manifest) -> Point:
    """What a manifest alone says of its step."""
    unknown = math.nan
    position = (manifest.created_s, manifest.generation, manifest.world_size, manifest.step, manifest.tau)
    return Point(*position, unknown, unknown, unknown, unknown, unknown)


def _listed(points: Sequence[Point]) -> jobs_pb2.ListPointsResponse:
    listed = jobs_pb2.ListPointsResponse(
        generation=[int(point.generation) for point in points], step=[int(point.step) for point in points]
    )
    for name in ("time_s", "tau", "gain", "scale", "loss", "effective_lr", "base_lr"):
        getattr(listed, name).extend(getattr(point, name) for point in points)
    listed.progress_rate.extend(_rates(points))
    return listed


def _rates(points: Sequence[Point]) -> list[float]:
    """d(tau)/dt up to each point; what lies between two runs of the job lowers it, as it did."""
    rates = [math.nan]
    for index, point in enumerate(points[1:], start=1):
        earlier = points[max(0, index - _RATE_POINTS)]
        elapsed_s = point.time_s - earlier.time_s
        rates.append((point.tau - earlier.tau) / elapsed_s if elapsed_s > 0 else math.nan)
    return rates[: len(points)]


def _generations(points: Sequence[Point]) -> list[jobs_pb2.GenerationSummary]:
    """One after the other, as far as points of them were kept."""
    groups: list[list[Point]] = []
    for point in points:
        if not groups or groups[-1][-1].generation != point.generation:
            groups.append([])
        groups[-1].append(point)
    return [_summary(group, following) for group, following in zip(groups, [*groups[1:], groups[-1]], strict=True)]


def _summary(group: Sequence[Point], following: Sequence[Point]) -> jobs_pb2.GenerationSummary:
    first, last = group[0], group[-1]
    end = following[0] if following is not group else last
    gains = [point.gain for point in group]
    return jobs_pb2.GenerationSummary(
        # The last step of an epoch may be smaller: S is what full ones have.
        generation=types_pb2.Generation(
            number=int(first.generation), world_size=int(first.workers), scale=max(point.scale for point in group)
        ),
        steps=int(end.step - first.step) + (1 if end is last else 0),
        mean_gain=sum(gains) / len(gains),
        effective_lr=last.effective_lr,
        first_tau=first.tau,
        last_tau=last.tau,
        pause_s=math.nan,
        started_s=first.time_s,
    )
