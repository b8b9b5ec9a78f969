"""torchrun's handler against a scripted controller (tests/scripted_rendezvous.py): what each says to the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import pytest
from scripted_rendezvous import PATIENCE_S, ScriptedRendezvous, Stream
from stretto.rendezvous import handler as handler_module
from stretto.rendezvous.handler import StrettoHandler, node_name
from stretto.rendezvous.plugin import factory
from stretto.rendezvous.settings import AgentSettings, job_name
from stretto_proto.v1 import rendezvous_pb2 as pb
from stretto_proto.v1 import types_pb2
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousInfo,
    RendezvousParameters,
)
from torch.distributed.elastic.utils.store import barrier

_EXIT_BARRIER = "torchelastic/agent/terminal_state"


class Agent:
    """A node under test; its blocking calls run in a thread of their own."""

    def __init__(self, server: ScriptedRendezvous) -> None:
        self.handler = StrettoHandler(AgentSettings((server.endpoint,), "job", 1, 3, join_timeout_s=PATIENCE_S))
        self._pool = ThreadPoolExecutor(1)

    def ask(self) -> Future[RendezvousInfo]:
        return self._pool.submit(self.handler.next_rendezvous)

    def finish(self, info: RendezvousInfo) -> Future[None]:
        return self._pool.submit(barrier, info.store, info.world_size, _EXIT_BARRIER, PATIENCE_S)

    def shutdown(self) -> Future[bool]:
        return self._pool.submit(self.handler.shutdown)


@pytest.fixture
def server() -> Iterator[ScriptedRendezvous]:
    server = ScriptedRendezvous()
    yield server
    server.stop()


@pytest.fixture
def agent(server: ScriptedRendezvous, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    for name in [name for name in os.environ if name.startswith("STRETTO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(handler_module, "_GOODBYE_TIMEOUT_S", 0.2)
    agent = Agent(server)
    yield agent
    agent.shutdown().result(PATIENCE_S)
    for name in [name for name in os.environ if name.startswith("STRETTO_")]:
        del os.environ[name]


def member_of(hello: pb.NodeHello, ready: pb.NodeReady, rank: int = 0, first_rank: int = 0) -> types_pb2.Member:
    return types_pb2.Member(
        node_id=hello.node_id,
        node_rank=rank,
        slots=hello.slots,
        first_rank=first_rank,
        address=hello.address,
        master_port=ready.master_port,
        store_port=ready.store_port,
    )


def stranger(rank: int, slots: int = 1, first_rank: int = 0) -> types_pb2.Member:
    return types_pb2.Member(
        node_id="stranger", node_rank=rank, slots=slots, first_rank=first_rank, address="10.0.0.9", master_port=5
    )


def join(server: ScriptedRendezvous, agent: Agent, number: int = 1) -> tuple[Stream, pb.NodeHello, RendezvousInfo]:
    """The node asks and becomes the only member of generation `number`."""
    asking = agent.ask()
    stream = server.stream()
    hello = stream.expect("hello").hello
    stream.welcome()
    stream.assign(hello.ready, number, [member_of(hello, hello.ready)])
    return stream, hello, asking.result(PATIENCE_S)


def test_the_first_hello_says_everything_and_asks(server: ScriptedRendezvous, agent: Agent) -> None:
    _, hello, info = join(server, agent)
    assert (hello.protocol_version, hello.job, hello.slots, hello.address) == (1, "job", 1, "127.0.0.1")
    assert (hello.spec.min_nodes, hello.spec.max_nodes) == (1, 3)
    assert hello.spec.mode == types_pb2.RECONFIGURE_MODE_RESTART
    assert len(hello.node_key) == 32
    assert hello.generation == 0
    ready = hello.ready
    assert (ready.request_id, ready.generation, ready.failed, ready.restarts_left) == (1, 0, False, -1)
    assert info.bootstrap_store_info is not None
    assert info.bootstrap_store_info.master_port == ready.master_port
    assert 0 < ready.store_port != ready.master_port


def test_the_leaders_address_and_port_go_to_the_workers(server: ScriptedRendezvous, agent: Agent) -> None:
    asking = agent.ask()
    stream = server.stream()
    hello = stream.expect("hello").hello
    stream.welcome()
    mine = member_of(hello, hello.ready, rank=1, first_rank=2)
    stream.assign(hello.ready, 7, [stranger(rank=0, slots=2), mine])
    info = asking.result(PATIENCE_S)
    assert (info.rank, info.world_size) == (1, 2)
    assert info.bootstrap_store_info is not None
    assert (info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port) == ("10.0.0.9", 5)
    assert info.store.get("torchelastic/assigned_ranks/1") == b"[2, 3, 2, 3]"
    assert os.environ["STRETTO_GENERATION"] == "7"
    assert os.environ["STRETTO_NODE"] == hello.node_id
    assert os.environ["STRETTO_ENDPOINT"] == server.endpoint
    assert (os.environ["STRETTO_JOB"], os.environ["STRETTO_MODE"]) == ("job", "restart")
    assert os.environ["STRETTO_AGENT_PID"] == str(os.getpid())
    assert len(os.environ["STRETTO_AGENT_MARK"]) == 32


def test_stopped_workers_are_not_failed_ones(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, hello, _ = join(server, agent)
    assert agent.handler.num_nodes_waiting() == 0
    stream.stop_workers(1)
    wait_for_stop(agent)
    asking = agent.ask()
    ready = stream.expect("ready").ready
    assert (ready.request_id, ready.generation, ready.failed) == (2, 1, False)
    assert ready.master_port != hello.ready.master_port
    stream.assign(ready, 2, [member_of(hello, ready)])
    asking.result(PATIENCE_S)
    assert agent.handler.num_nodes_waiting() == 0


def wait_for_stop(agent: Agent) -> None:
    """Until the message has come; torch polls in the same way."""
    attendance = agent.handler._attendance
    assert attendance is not None
    with attendance._changed:
        assert attendance._changed.wait_for(lambda: agent.handler.num_nodes_waiting() > 0, PATIENCE_S)


def test_an_old_stop_does_not_stop_a_newer_generation(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, hello, _ = join(server, agent, number=5)
    stream.stop_workers(4)
    attendance = agent.handler._attendance
    assert attendance is not None
    with attendance._changed:
        assert attendance._changed.wait_for(lambda: attendance._stopped == 4, PATIENCE_S)
    assert agent.handler.num_nodes_waiting() == 0
    asking = agent.ask()
    ready = stream.expect("ready").ready
    assert ready.failed
    stream.assign(ready, 6, [member_of(hello, ready)], at_fault=True)
    asking.result(PATIENCE_S)
    assert agent.handler.at_fault


def test_an_agent_that_asks_unasked_reports_failed_workers(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, hello, _ = join(server, agent)
    agent.handler.restarts_left = 3
    asking = agent.ask()
    ready = stream.expect("ready").ready
    assert (ready.generation, ready.failed, ready.restarts_left) == (1, True, 3)
    stream.assign(ready, 2, [member_of(hello, ready)])
    asking.result(PATIENCE_S)


def test_an_answer_to_an_older_request_is_ignored(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, hello, _ = join(server, agent)
    asking = agent.ask()
    ready = stream.expect("ready").ready
    stream.assign(hello.ready, 1, [member_of(hello, hello.ready)])
    stream.assign(ready, 3, [member_of(hello, ready)])
    asking.result(PATIENCE_S)
    assert agent.handler.generation == 3


def test_a_broken_stream_is_opened_again_and_asks_again(server: ScriptedRendezvous, agent: Agent) -> None:
    asking = agent.ask()
    first = server.stream()
    hello = first.expect("hello").hello
    first.welcome()
    first.close()
    second = server.stream()
    again = second.expect("hello").hello
    assert (again.node_id, again.node_key, again.ready) == (hello.node_id, hello.node_key, hello.ready)
    second.welcome()
    second.assign(again.ready, 1, [member_of(again, again.ready)])
    asking.result(PATIENCE_S)
    second.close()
    third = server.stream().expect("hello").hello
    assert (third.generation, third.HasField("ready")) == (1, False)
    assert agent.handler.num_nodes_waiting() == 0


def test_heartbeats_come_at_the_controllers_pace_and_carry_the_generation(
    server: ScriptedRendezvous, agent: Agent
) -> None:
    asking = agent.ask()
    stream = server.stream()
    hello = stream.expect("hello").hello
    stream.welcome(heartbeat_interval_s=0.01)
    stream.expect("heartbeat")
    stream.assign(hello.ready, 4, [member_of(hello, hello.ready)])
    asking.result(PATIENCE_S)
    # Those of before the assignment may still be on their way.
    assert any(stream.expect("heartbeat").heartbeat.generation == 4 for _ in range(1000))


def test_success_releases_the_agent_when_all_have_finished(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, _, info = join(server, agent)
    finishing = agent.finish(info)
    assert stream.expect("succeeded").succeeded.generation == 1
    stream.finish(1)
    finishing.result(PATIENCE_S)


def test_success_is_said_again_after_a_reconnection(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, _, info = join(server, agent)
    finishing = agent.finish(info)
    stream.expect("succeeded")
    stream.close()
    stream = server.stream()
    assert stream.expect("hello").hello.generation == 1
    assert stream.expect("succeeded").succeeded.generation == 1
    stream.welcome()
    stream.finish(1)
    finishing.result(PATIENCE_S)


def test_an_agent_in_the_exit_barrier_goes_when_the_others_are_stopped(
    server: ScriptedRendezvous, agent: Agent
) -> None:
    stream, _, info = join(server, agent)
    finishing = agent.finish(info)
    stream.expect("succeeded")
    stream.stop_workers(1)
    finishing.result(PATIENCE_S)
    agent.shutdown()
    assert stream.expect("leave").leave.reason == pb.LEAVE_REASON_SUCCEEDED


def test_a_node_dismissed_well_ends_gracefully(server: ScriptedRendezvous, agent: Agent) -> None:
    asking = agent.ask()
    stream = server.stream()
    stream.expect("hello")
    stream.welcome()
    stream.dismiss(success=True, reason="drained")
    with pytest.raises(RendezvousGracefulExitError, match="drained"):
        asking.result(PATIENCE_S)


def test_a_dismissal_while_workers_run_stops_them_first(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, _, _ = join(server, agent)
    stream.dismiss(success=False, reason="too slow")
    wait_for_stop(agent)
    with pytest.raises(RendezvousClosedError, match="too slow"):
        agent.ask().result(PATIENCE_S)


def test_a_refusal_shows_the_controllers_words(server: ScriptedRendezvous, agent: Agent) -> None:
    server.refusal = (grpc.StatusCode.FAILED_PRECONDITION, "max_nodes is 3 here, but the job runs with 4")
    with pytest.raises(RendezvousClosedError, match="max_nodes is 3 here, but the job runs with 4"):
        agent.ask().result(PATIENCE_S)


def test_an_agent_that_gives_up_says_so(server: ScriptedRendezvous, agent: Agent) -> None:
    stream, _, _ = join(server, agent)
    agent.shutdown()
    assert stream.expect("leave").leave.reason == pb.LEAVE_REASON_FAILED


def test_nobody_at_the_endpoint_is_said_within_the_join_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler_module, "_GOODBYE_TIMEOUT_S", 0.2)
    server = ScriptedRendezvous()
    server.stop()
    handler = StrettoHandler(AgentSettings((server.endpoint,), "job", 1, 1, join_timeout_s=0.2))
    with pytest.raises(RendezvousConnectionError, match=r"no controller could be reached at .* for 0.2 s"):
        handler.next_rendezvous()
    handler.shutdown()


def parameters(**config: object) -> RendezvousParameters:
    return RendezvousParameters("stretto", "localhost", "job", 1, 2, local_addr="127.0.0.1", **config)


def test_the_plugin_makes_handlers_from_torchruns_parameters() -> None:
    handler = factory()(parameters(reconfigure="restart", timeout=900))
    assert (handler.get_backend(), handler.get_run_id()) == ("stretto", "job")
    assert not handler.is_closed()
    assert not handler.use_agent_store
    handler.shutdown()
    assert handler.is_closed()


def test_parameters_become_settings() -> None:
    settings = AgentSettings.from_parameters(parameters(join_timeout="7.5", slots="2"))
    assert settings.endpoints == ("localhost:29400",)
    assert (settings.join_timeout_s, settings.slots, settings.address) == (7.5, 2, "127.0.0.1")
    assert settings.reconfigure == "restart"
    live = AgentSettings.from_parameters(parameters(reconfigure="in-process", sign_in_warning="5", sign_in_limit="9"))
    assert (live.reconfigure, live.sign_in_warning_s, live.sign_in_limit_s) == ("in-process", 5.0, 9.0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"reconfigure": "sometimes"}, "allowed are restart and in-process"),
        ({"join_timeout": "soon"}, "join_timeout=soon; it must be a number above 0"),
        ({"slots": "0"}, "slots=0; it must be a whole number above 0"),
        ({"slots": "1.5"}, "slots=1.5; it must be a whole number above 0"),
        ({"sign_in_warning": "0"}, "sign_in_warning=0; it must be a number above 0"),
    ],
)
def test_bad_parameters_are_refused_with_what_is_allowed(config: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AgentSettings.from_parameters(parameters(**config))


def test_unknown_parameters_are_named(caplog: pytest.LogCaptureFixture) -> None:
    AgentSettings.from_parameters(parameters(last_call_timeout=1, timeout=900))
    assert "last_call_timeout ignored" in caplog.text
    assert "timeout ignored" not in caplog.text.replace("last_call_timeout ignored", "")


def test_run_ids_become_names_that_the_controller_accepts() -> None:
    assert job_name("job-1") == "job-1"
    assert job_name("Bench_1").startswith("bench-1-")
    assert job_name("a_b") != job_name("a.b")
    assert job_name("___").startswith("job-")
    assert len(job_name("x" * 200)) <= 63


def test_a_node_is_named_by_the_user_or_by_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STRETTO_AGENT_MARK", raising=False)
    monkeypatch.delenv("STRETTO_NODE", raising=False)
    # A process may hold hundreds of agents: four hexadecimal digits were not enough.
    assert len({node_name() for _ in range(5000)}) == 5000
    monkeypatch.setenv("STRETTO_NODE", "trainer-3")
    assert node_name() == "trainer-3"
    # Inside another agent's worker the variable names that other node.
    monkeypatch.setenv("STRETTO_AGENT_MARK", "f00")
    assert node_name() != "trainer-3"


def failure(exitcode: int, second: int) -> ProcessFailure:
    made = ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file="<none>")
    made.timestamp = second
    return made


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([(-9, 5)], 9),
        ([(1, 5)], 0),
        # torch SIGTERMs the others after the first failure.
        ([(1, 5), (-15, 5)], 0),
        ([(-15, 5), (-9, 5), (1, 5)], 9),
        ([(1, 5), (-9, 35)], 0),
        ([(-15, 5)], 15),
        ([], 0),
    ],
)
def test_the_signal_that_came_first_is_reported(ends: list[tuple[int, int]], expected: int) -> None:
    from stretto.rendezvous.caller import first_exit_signal

    failures = {rank: failure(exitcode, second) for rank, (exitcode, second) in enumerate(ends)}
    assert first_exit_signal(RunResult(WorkerState.FAILED, failures=failures)) == expected
