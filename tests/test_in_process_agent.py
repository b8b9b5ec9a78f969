"""torchrun's handler in in-process mode, against a scripted controller: it lets workers start, and supervises them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from scripted_rendezvous import PATIENCE_S, ScriptedRendezvous, Stream
from stretto.rendezvous import handler as handler_module
from stretto.rendezvous import start as start_module
from stretto.rendezvous.handler import StrettoHandler
from stretto.rendezvous.settings import AgentSettings
from stretto.rendezvous.sign_in import SIGN_IN_VARIABLE, sign_in
from stretto.rendezvous.start import START_VARIABLE, WorkerStart
from stretto_proto.v1 import rendezvous_pb2 as pb
from stretto_proto.v1 import types_pb2
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent, WorkerSpec
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousGracefulExitError, RendezvousInfo
from torch.distributed.elastic.utils.store import barrier


class Agent:
    """A node under test with two workers; its blocking calls run in a thread of their own."""

    SLOTS = 2

    def __init__(self, server: ScriptedRendezvous) -> None:
        settings = AgentSettings(
            (server.endpoint,),
            "job",
            1,
            3,
            address="localhost",
            join_timeout_s=PATIENCE_S,
            slots=self.SLOTS,
            reconfigure="in-process",
        )
        self.handler = StrettoHandler(settings)
        self._pool = ThreadPoolExecutor(1)

    def ask(self) -> Future[RendezvousInfo]:
        return self._pool.submit(self.handler.next_rendezvous)

    def finish(self, info: RendezvousInfo) -> Future[None]:
        return self._pool.submit(barrier, info.store, info.world_size, "torchelastic/agent/terminal_state", PATIENCE_S)

    def shutdown(self) -> Future[bool]:
        return self._pool.submit(self.handler.shutdown)

    def wait_for_stop(self) -> None:
        """Until the message has come; torch polls in the same way."""
        attendance = self.handler._attendance
        assert attendance is not None
        with attendance._changed:
            assert attendance._changed.wait_for(lambda: attendance._is_over(), PATIENCE_S)


@pytest.fixture
def server() -> Iterator[ScriptedRendezvous]:
    server = ScriptedRendezvous()
    yield server
    server.stop()


@pytest.fixture
def agent(server: ScriptedRendezvous, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    for name in [name for name in os.environ if name.startswith("STRETTO_")]:
        monkeypatch.delenv(name)
    # As a worker of another agent would find it.
    monkeypatch.setenv("STRETTO_GENERATION", "7")
    monkeypatch.setattr(handler_module, "_GOODBYE_TIMEOUT_S", 0.2)
    agent = Agent(server)
    yield agent
    agent.shutdown().result(PATIENCE_S)
    for name in [name for name in os.environ if name.startswith("STRETTO_")]:
        del os.environ[name]


def join(server: ScriptedRendezvous, agent: Agent) -> tuple[Stream, pb.NodeHello, RendezvousInfo]:
    """The node asks, and may start its workers."""
    asking = agent.ask()
    stream = server.stream()
    hello = stream.expect("hello").hello
    stream.welcome()
    stream.start_workers(hello.ready)
    return stream, hello, asking.result(PATIENCE_S)


def all_sign_in() -> None:
    for number in range(Agent.SLOTS):
        sign_in({**os.environ, "RANK": str(number)})


class _TorchAgent(SimpleElasticAgent):
    """Only to reach torch's own rank assignment."""

    def __init__(self) -> None:
        pass

    def _start_workers(self, *args: object) -> dict[int, object]:
        raise AssertionError

    _stop_workers = _monitor_workers = _shutdown = _start_workers  # type: ignore[assignment]  # never called


def ranks_by_torch(info: RendezvousInfo) -> list[tuple[int, int, int]]:
    spec = WorkerSpec(
        role="trainer",
        local_world_size=Agent.SLOTS,
        rdzv_handler=None,  # type: ignore[arg-type]  # not used there
        entrypoint="x",
    )
    workers = _TorchAgent()._assign_worker_ranks(info.store, info.rank, info.world_size, spec)
    return [(w.local_rank, w.global_rank, w.world_size) for w in workers]


def test_the_hello_names_the_mode_and_an_address_in_numbers(server: ScriptedRendezvous, agent: Agent) -> None:
    _, hello, _ = join(server, agent)
    assert hello.spec.mode == types_pb2.RECONFIGURE_MODE_IN_PROCESS
    assert hello.address in ("127.0.0.1", "::1")
    assert (hello.slots, hello.generation) == (2, 0)
    ready = hello.ready
    assert (ready.request_id, ready.failed, ready.master_port, ready.store_port) == (1, False, 0, 0)


def test_torchs_agent_has_a_rendezvous_with_itself(server: ScriptedRendezvous, agent: Agent) -> None:
    _, _, info = join(server, agent)
    assert (info.rank, info.world_size) == (0, 1)
    # Never a world size of 1 where the job may have more workers: many scripts would then train alone.
    assert ranks_by_torch(info) == [(0, 0, 6), (1, 1, 6)]
    info.store.set("anything", "kept")
    assert info.store.get("anything") == b"kept"


def test_a_plain_script_finds_a_port_that_says_what_to_do(server: ScriptedRendezvous, agent: Agent) -> None:
    _, _, info = join(server, agent)
    assert info.bootstrap_store_info is not None
    assert info.bootstrap_store_info.master_addr == "this-script-does-not-use-stretto.in-process-mode.invalid"
    port = str(info.bootstrap_store_info.master_port)
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int(port)
    # Python cuts what it shows; the advice must not be what is cut.
    assert repr(port) in str(caught.value)
    assert "stretto.ElasticTrainer" in port
    assert "--rdzv-conf=reconfigure=restart (stretto run: --reconfigure restart)" in port


def test_workers_find_who_they_are_and_no_generation(server: ScriptedRendezvous, agent: Agent) -> None:
    _, hello, _ = join(server, agent)
    assert os.environ["STRETTO_MODE"] == "in-process"
    assert os.environ["STRETTO_NODE"] == hello.node_id
    assert os.environ["STRETTO_ADDRESS"] == hello.address
    assert os.environ["STRETTO_AGENT_PID"] == str(os.getpid())
    assert (os.environ["STRETTO_ENDPOINT"], os.environ["STRETTO_JOB"]) == (server.endpoint, "job")
    assert {len(os.environ["STRETTO_AGENT_MARK"]), len(os.environ[START_VARIABLE])} == {32}
    assert "STRETTO_GENERATION" not in os.environ


def test_leave_to_start_for_an_older_request_is_ignored(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, hello, _ = join(server, agent)
    asking = agent.ask()
    ready = stream.expect("ready").ready
    stream.start_workers(hello.ready)
    stream.start_workers(ready, at_fault=True)
    asking.result(PATIENCE_S)
    assert (ready.request_id, ready.generation, ready.failed) == (2, 0, True)
    assert agent.handler.at_fault


def test_each_start_has_a_mark_of_its_own(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, _, _ = join(server, agent)
    first = (os.environ[START_VARIABLE], os.environ[SIGN_IN_VARIABLE])
    start_again(stream, agent)
    assert os.environ[START_VARIABLE] != first[0]
    assert not Path(first[1]).exists()
    assert Path(os.environ[SIGN_IN_VARIABLE]).is_dir()


def test_hung_workers_are_killed_once_torch_knows_and_are_no_failure(
    server: ScriptedRendezvous, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[str] = []
    done, torch_knows = threading.Event(), threading.Event()

    def kill(entry: bytes, agent_group: int) -> None:
        assert torch_knows.is_set(), "torch would count dead workers as failed ones"
        killed.append(entry.decode())
        done.set()

    monkeypatch.setattr(start_module, "kill_carriers", kill)
    monkeypatch.setattr(start_module, "SEEN_LIMIT_S", PATIENCE_S)
    stream, _, _ = join(server, agent)
    mark = os.environ[START_VARIABLE]
    assert agent.handler.num_nodes_waiting() == 0
    stream.stop_workers(5, force=True)
    agent.wait_for_stop()
    torch_knows.set()
    assert agent.handler.num_nodes_waiting() == 1
    assert done.wait(PATIENCE_S)
    assert killed == [f"{START_VARIABLE}={mark}"]
    asking = agent.ask()
    ready = stream.expect("ready").ready
    assert (ready.failed, ready.exit_signal) == (False, 0)
    stream.start_workers(ready)
    asking.result(PATIENCE_S)
    assert agent.handler.num_nodes_waiting() == 0


def test_a_stop_that_is_not_forced_kills_nobody(
    server: ScriptedRendezvous, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[WorkerStart] = []
    monkeypatch.setattr(WorkerStart, "kill", killed.append)
    stream, _, _ = join(server, agent)
    stream.stop_workers(5)
    agent.wait_for_stop()
    assert agent.handler.num_nodes_waiting() == 1
    start_again(stream, agent)
    assert killed == []


def start_again(stream: Stream, agent: Agent, *, stopped_before: bool = False) -> None:
    """The node asks again. What was said to it before has been heard when this returns."""
    asking = agent.ask()
    ready = stream.expect("ready").ready
    if stopped_before:
        stream.stop_workers(5, force=True)
    stream.start_workers(ready)
    asking.result(PATIENCE_S)


def test_a_stop_that_comes_while_no_worker_runs_does_not_stop_the_next_ones(
    server: ScriptedRendezvous, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[WorkerStart] = []
    monkeypatch.setattr(WorkerStart, "kill", killed.append)
    stream, _, _ = join(server, agent)
    start_again(stream, agent, stopped_before=True)
    assert agent.handler.num_nodes_waiting() == 0
    assert killed == []


def test_a_broken_stream_neither_stops_workers_nor_asks_for_more(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, first, _ = join(server, agent)
    stream.close()
    hello = server.stream().expect("hello").hello
    assert (hello.node_id, hello.node_key) == (first.node_id, first.node_key)
    assert (hello.generation, hello.HasField("ready")) == (0, False)
    assert agent.handler.num_nodes_waiting() == 0


def test_success_releases_the_agent_at_the_end_of_the_job(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, _, info = join(server, agent)
    all_sign_in()
    finishing = agent.finish(info)
    assert stream.expect("succeeded").succeeded.generation == 0
    stream.close()
    stream = server.stream()
    stream.expect("hello")
    assert stream.expect("succeeded").succeeded.generation == 0
    stream.welcome()
    stream.finish(4)
    finishing.result(PATIENCE_S)
    agent.shutdown()


def test_an_agent_whose_workers_are_done_goes_when_it_is_dismissed(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, _, info = join(server, agent)
    all_sign_in()
    finishing = agent.finish(info)
    stream.expect("succeeded")
    stream.dismiss(success=True)
    finishing.result(PATIENCE_S)


@pytest.mark.parametrize("success", [True, False])
def test_a_dismissal_stops_the_workers_and_ends_the_agent(
    server: ScriptedRendezvous, agent: Agent, success: bool
) -> None:
    stream, _, _ = join(server, agent)
    stream.dismiss(success=success, reason="the job is done")
    agent.wait_for_stop()
    assert agent.handler.num_nodes_waiting() == 1
    with pytest.raises(RendezvousGracefulExitError if success else RendezvousClosedError, match="the job is done"):
        agent.ask().result(PATIENCE_S)


def test_workers_that_end_without_a_session_are_no_success(
    server: ScriptedRendezvous, agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    stream, _, info = join(server, agent)
    sign_in({**os.environ, "RANK": "0"})
    with pytest.raises(SystemExit) as ended:
        agent.finish(info).result(PATIENCE_S)
    assert ended.value.code == 1
    assert "worker 1 of this node ended without a session with the controller" in caplog.text
    assert "--rdzv-conf=reconfigure=restart on all nodes (stretto run: --reconfigure restart)" in caplog.text
    agent.shutdown()
    leave = stream.expect("leave").leave
    assert leave.reason == pb.LEAVE_REASON_FAILED
    assert "worker 1 of this node ended without a session with the controller" in leave.message


def test_workers_without_a_session_are_named_after_the_limit_and_again_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    start = WorkerStart(3, 60.0, 3600.0, now_s=100.0)
    directory = start.environment[SIGN_IN_VARIABLE]
    sign_in({SIGN_IN_VARIABLE: directory, "RANK": "1"})
    caplog.set_level(logging.WARNING)
    start.watch(stopping=False, now_s=159.0)
    assert not caplog.records
    start.watch(stopping=False, now_s=160.0)
    assert "workers 0, 2 of this node began no session with the controller within 60 s" in caplog.text
    caplog.clear()
    start.watch(stopping=False, now_s=219.0)
    assert not caplog.records
    sign_in({SIGN_IN_VARIABLE: directory, "RANK": "2"})
    start.watch(stopping=False, now_s=220.0)
    assert "worker 0 of this node began no session with the controller within 120 s" in caplog.text
    assert start.objection() is not None
    sign_in({SIGN_IN_VARIABLE: directory, "RANK": "0"})
    assert start.objection() is None
    start.close()
    # Who was there once needs no file any more.
    assert start.objection() is None


def test_signing_in_is_for_those_who_are_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sign_in({})
    sign_in({SIGN_IN_VARIABLE: str(tmp_path / "gone"), "RANK": "0"})
    assert "cannot tell the agent that this worker uses stretto" in caplog.text
