"""A controller of one's own, as a subprocess: for `stretto run` without an endpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from stretto.errors import Fatal
from stretto.rendezvous.guardian import MARK_VARIABLE, the_guardian


class EmbeddedController:
    """`stretto controller` on free ports of this machine, from `__enter__` to `__exit__`; ends with this process.

    data_dir: kept over runs, so that generations go on where they were and old checkpoints stay fenced.
    """

    # A controller starts in about a second; a machine may be busy.
    START_LIMIT_S = 60.0
    STOP_LIMIT_S = 10.0

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._ready_file = data_dir / "ready.json"
        self._process: subprocess.Popen[bytes] | None = None
        self.log_path = data_dir / "controller.log"
        # HOST:PORT for agents, and the URL of the page.
        self.endpoint = ""
        self.url = ""

    def __enter__(self) -> EmbeddedController:
        """Raises Fatal, with the end of its log, if it does not come to serve."""
        self._data_dir.mkdir(parents=True, exist_ok=True)
        self._ready_file.unlink(missing_ok=True)
        guardian = the_guardian()
        guardian.hold()
        environment = {
            **os.environ,
            # The guardian ends it if this process is killed.
            MARK_VARIABLE: guardian.mark,
            # Nobody else knew its ports: after a crash there is no one to wait for.
            "STRETTO_LIMITS_RECOVERY_GRACE_S": "0.5",
        }
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*_STRETTO, "controller", *self._options()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # Ctrl-C is for the agent; it stops the controller last.
                start_new_session=True,
            )
        self._await_ready(self._process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        assert process is not None
        process.terminate()
        try:
            process.wait(self.STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        the_guardian().release()

    def _options(self) -> list[str]:
        return [
            *("--host", "127.0.0.1", "--grpc-port", "0", "--http-port", "0"),
            *("--data-dir", str(self._data_dir), "--ready-file", str(self._ready_file)),
        ]

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline_s = time.monotonic() + self.START_LIMIT_S
        while not self._ready_file.exists():
            if process.poll() is not None or time.monotonic() > deadline_s:
                process.kill()
                process.wait()
                tail = self.log_path.read_text(errors="replace")[-2000:]
                raise Fatal(f"the controller did not start; the end of {self.log_path}:\n{tail}")
            time.sleep(0.02)
        ready = json.loads(self._ready_file.read_text())
        self.endpoint, self.url = ready["grpc"], ready["http"]


_STRETTO = (sys.executable, "-c", "from stretto.cli import main; main()")
