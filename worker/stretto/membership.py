"""How a training process takes part in a job: in one world for good, or in one live generation after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from stretto_proto.v1 import types_pb2

from stretto.checkpoint import Failed, Saved
from stretto.live import LiveSession
from stretto.session import Session
from stretto.trainer_settings import TrainerSettings
from stretto.unattended import Unattended
from stretto.world import World


class FixedMembership:
    """Restart mode, or no controller at all: one world for as long as the process lives."""

    def __init__(
        self,
        session: Session | Unattended,
        settings: TrainerSettings,
        device: torch.device,
        on_commit: Callable[[int], None],
    ) -> None:
        self._session = session
        self._settings = settings
        self._device = device
        self._on_commit = on_commit
        self._entered = False

    def enter(self) -> World:
        """Meet the other ranks; once."""
        if self._entered:
            raise RuntimeError("this process has one world only; its agent starts a new process for the next")
        self._entered = True
        return World(
            self._session,
            device=self._device,
            backend=self._settings.backend,
            timeout_s=self._settings.collective_timeout_s,
            on_commit=self._on_commit,
        )

    def checkpoint_committed(self, saved: Saved) -> None:
        """Tell the controller of a checkpoint that is whole."""
        self._session.checkpoint_committed(
            saved.step, saved.tau, saved.path, size_bytes=saved.size_bytes, duration_s=saved.duration_s
        )

    def checkpoint_failed(self, failed: Failed) -> None:
        """Tell the controller of a save that came to nothing."""
        self._session.checkpoint_failed(failed.step, failed.reason)

    def close(self) -> None:
        self._session.close()


def open_membership(
    spec: types_pb2.JobSpec,
    settings: TrainerSettings,
    device: torch.device,
    *,
    saves: bool,
    on_commit: Callable[[int], None],
) -> LiveSession | FixedMembership:
    """What the environment says that this process is: a live worker, one in restart mode, or its own master."""
    live = LiveSession.from_environment(spec, settings.live, device=device, backend=settings.backend)
    if live is not None:
        live.on_commit(on_commit)
        return live
    session = Session.from_environment(spec, settings.session)
    return FixedMembership(
        session or Unattended(saves=saves, grace_s=settings.sigterm_grace_s), settings, device, on_commit
    )
