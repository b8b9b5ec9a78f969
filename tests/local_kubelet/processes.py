"""One container as processes of this machine: started, told to end, and ended with everything that it started."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

# In the environment of every process of a container, so that they are found wherever they went.
_MARK = "LOCAL_KUBELET_CONTAINER"
_LOOK_INTERVAL_S = 0.05


class ContainerProcess:
    """Runs a command until it ends. `exit_code` as Kubernetes tells it: 128 + N after signal N."""

    def __init__(
        self, mark: str, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path
    ) -> None:
        """mark: unique to this container of this pod. Raises OSError where the command cannot be started."""
        self._mark = mark
        self.started_at = now()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                list(command),
                cwd=folder,
                env={**environment, _MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while the container's first process runs."""
        code = self._process.poll()
        return None if code is None else code if code >= 0 else 128 - code

    async def ended(self) -> int:
        """Wait for the first process; what it leaves behind is killed, as in a container."""
        while (code := self.exit_code) is None:
            await asyncio.sleep(_LOOK_INTERVAL_S)
        self.kill()
        return code

    def terminate(self, number: int = signal.SIGTERM) -> None:
        """Signal the first process alone, as a kubelet does."""
        if self.exit_code is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9 of every process of the container."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pid in _marked(self._mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def now() -> str:
    """The time as the API writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _marked(mark: str) -> list[int]:
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found
