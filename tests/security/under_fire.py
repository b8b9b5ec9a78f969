"""A real controller with tokens, a job that trains on it, and a speaker that may touch another job alone."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from harness.controller import ControllerProcess
from harness.raw import RawLiveWorker, RawNode
from harness.raw_job import PATIENT_LIMITS
from load.wire import Connection, closing, framed, opening
from security.hostile import Hostile
from stretto_controller.auth.access import Principal, Role
from stretto_controller.auth.tokens import line_of, new_token
from stretto_proto.v1 import jobs_pb2
from stretto_proto.v1 import types_pb2 as types

WELL, HOSTILE = "well", "hostile"
_METHODS = [(f"/stretto.v1.Jobs/{m.name}", m) for m in jobs_pb2.DESCRIPTOR.services_by_name["Jobs"].methods]
_STREAMS = {
    "Rendezvous": "/stretto.v1.Rendezvous/Attend",
    "Training": "/stretto.v1.Training/Train",
}
_AT_ONCE = 16
# Generous: a stream that never ends is found by that alone.
_CALL_LIMIT_S = 30.0
# What a fault of the controller's own would look like; -1: no status at all.
OURS = {-1} | {code.value[0] for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS)}


class Attack(Connection):
    """Sends the messages when the server has told its windows, and then hangs up, or waits for the status."""

    def __init__(self, first: bytes, messages: Sequence[bytes], hangs_up: bool) -> None:
        self.ended: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        super().__init__(first, lambda data: None, lambda status, message: self.ended.set_result((status, message)))
        self._rest = b"".join(map(framed, messages)) + closing()
        self._hangs_up = hangs_up

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._rest:
            self.write(self._rest)
            self._rest = b""
            if self._hangs_up:
                self.abort()
                self.ended.set_result((-1, ""))


class UnderFire:
    """One agent and one live worker of job `well` train in generation 1; attacks come with the token of `hostile`."""

    def __init__(self, directory: Path) -> None:
        self.tokens = {"admin": new_token(), HOSTILE: new_token(), WELL: new_token()}
        who = {"admin": Principal(Role.ADMIN), **{job: Principal(Role.JOB, job) for job in (HOSTILE, WELL)}}
        file = directory / "tokens"
        file.write_text("\n".join(line_of(who[name], token) for name, token in self.tokens.items()))
        environment = {
            **PATIENT_LIMITS,
            "STRETTO_SECURITY_TOKENS": str(file),
            "STRETTO_SERVICE_MAX_JOBS": "8",
            "STRETTO_LOG_FORMAT": "json",
        }
        self.controller = ControllerProcess(directory, **environment)
        self.outcomes: Counter[int] = Counter()
        self.sent = 0
        # Calls that ended as only a fault of the controller's own ends them.
        self.faults: list[str] = []

    def __enter__(self) -> UnderFire:
        self.controller.start()
        metadata = (("authorization", f"Bearer {self.tokens[WELL]}"),)
        spec = {"min_nodes": 1, "max_nodes": 1, "mode": types.RECONFIGURE_MODE_IN_PROCESS}
        self._node = RawNode(self.controller.grpc, WELL, "n0", metadata=metadata, **spec)
        self._node.connect(ready=True)
        self._node.hears("start_workers")
        self.worker = RawLiveWorker(self.controller.grpc, WELL, "n0", metadata=metadata)
        self.worker.connect(spec=types.JobSpec(base_batch_size=8, batch_size=8))
        assert self.worker.place().generation == 1
        return self

    def __exit__(self, *_: Any) -> None:
        self.worker.__exit__(None, None, None)
        self._node.__exit__(None, None, None)
        self.controller.__exit__(None, None, None)

    @property
    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.controller.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1000

    async def attack(self, seed: int, inputs: int) -> None:
        """Send about so many hostile messages, several streams at once."""
        hostile = Hostile(seed, (HOSTILE, WELL, "nobody"))
        goal = self.sent + inputs
        while self.sent < goal:
            await asyncio.gather(*(self._call(hostile) for _ in range(_AT_ONCE)))

    async def _call(self, hostile: Hostile) -> None:
        if hostile.rng.random() < 0.3:
            path, method = hostile.rng.choice(_METHODS)
            messages, hangs_up = [hostile.request(method.input_type)], False
        else:
            service = hostile.rng.choice(sorted(_STREAMS))
            path, messages = _STREAMS[service], hostile.conversation(service)
            hangs_up = hostile.rng.random() < 0.2
        self.sent += len(messages)
        host, _, port = self.controller.grpc.rpartition(":")
        attack = Attack(opening(path, self.controller.grpc, f"Bearer {self.tokens[HOSTILE]}"), messages, hangs_up)
        await asyncio.get_running_loop().create_connection(lambda: attack, host, int(port))
        try:
            async with asyncio.timeout(_CALL_LIMIT_S):
                status, message = await attack.ended
        except TimeoutError:
            attack.abort()
            status, message = -1, f"no end within {_CALL_LIMIT_S:g} s"
        if hangs_up:
            return
        self.outcomes[status] += 1
        if status in OURS:
            self.faults.append(f"{path}: {status} {message}; {[len(message) for message in messages]}")

    def assert_well(self) -> None:
        """The controller answers, its other job was never touched, and its log tells of no fault of ours."""
        assert self.controller.alive()
        assert not self.faults, (Counter(self.faults), self.outcomes)
        job = self.shown(WELL)
        assert (job["phase"], job["generation"]["number"], job["spec"]["max_nodes"]) == ("running", 1, 1)
        assert [(node["node_id"], node["state"], node["connected"]) for node in job["nodes"]] == [
            ("n0", "active", True)
        ]
        self.worker.ask(step=10, failed=True)
        assert self.worker.place().generation == 2
        log = self.controller.log
        for word in ("Traceback", '"level": "error"', '"level": "critical"', "never retrieved"):
            assert word not in log, log[log.index(word) - 500 :][:3000]

    def assert_no_secret_is_told(self) -> None:
        """No token and no agent's key is in the log, the metrics, the events, the jobs, or anywhere on disk."""
        keys = [self._node.key, *(f"the secret key of n{number}" for number in range(4))]
        admin = self.tokens["admin"]
        told = {"log": self.controller.log}
        for path in ("/metrics", "/api/v1/jobs", "/openapi.json"):
            told[path] = self.controller.text(path, admin, accept="application/json")
        jobs = [job["name"] for job in json.loads(told["/api/v1/jobs"])["jobs"]]
        for job, part in itertools.product(jobs, ("", "/events", "/history")):
            told[f"{job}{part}"] = self.controller.text(f"/api/v1/jobs/{job}{part}", admin, accept="application/json")
        for file in self.controller.directory.rglob("*"):
            if file.is_file():
                told[str(file)] = file.read_bytes().decode("latin-1")
        for secret in (*self.tokens.values(), *keys):
            assert not [where for where, text in told.items() if secret in text]

    def header(self, who: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.tokens[who]}"}

    def shown(self, job: str) -> Any:
        return self.controller.get(f"/api/v1/jobs/{job}", token=self.tokens["admin"])

    def series(self, name: str) -> float:
        """One of the controller's own metrics."""
        text = self.controller.text("/metrics", token=self.tokens["admin"])
        return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])
