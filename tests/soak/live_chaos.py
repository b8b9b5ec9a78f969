"""Random events of every kind against one job of live workers, each followed by a wait until all train again."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from harness.agents import Agents, Row
from harness.controller import ControllerProcess
from harness.live_job import LiveJob
from harness.network import Network

MAX_NODES = 4
# The host of the controller.
CONTROLLER = "control"
# For everything that one event sets off, with workers that are started anew, on a machine that has other work.
PATIENCE_S = 150.0
IN_A_STEP = ("forward", "backward", "all_reduce", "optimizer")
IN_A_CHECKPOINT = ("before checkpoint", "state", "after share", "after checkpoint")
# Where a survivor gets when the others of its generation are gone.
IN_A_CHANGE = ("ask", "before build", "after build", "broadcast")
WAYS_TO_END = ("KILL", "raise", "memory")


@dataclass(frozen=True)
class Happened:
    """One event, and what came of it."""

    name: str
    # The longest time in which no worker finished a step.
    gap_s: float
    # Until all nodes that should train did.
    whole_s: float


class LiveChaos:
    """The job, who takes part in it, and what is done to it. The same seed makes the same schedule."""

    def __init__(self, seed: int, job: LiveJob, network: Network | None) -> None:
        """network: where the nodes have hosts of their own, if they do."""
        self.network = network
        self.rng = random.Random(seed)
        self.job = job
        self.agents: Agents = job.agents
        self.controller: ControllerProcess = job.controller
        # By name: how many workers each living node has.
        self.slots: dict[str, int] = {}
        # Started by torchrun itself, rather than by `stretto run`.
        self.stock: set[str] = set()
        self.wanted = MAX_NODES
        self.members: list[str] = []
        self.story: list[Happened] = []
        # Nodes that were asked to go; whether their agents must exit with 0.
        self.leaving: dict[str, bool] = {}
        self._count = 0

    def once(self) -> Happened:
        """One event, drawn from those that are possible now, and the wait for its end."""
        choices: list[Callable[[], None]] = [self.controller_dies, self.pause, self.scale]
        if len(self.slots) < MAX_NODES:
            choices += [self.join] * 4
        if len(self.members) > 1:
            # The only member of all has the state that nobody else has.
            choices += [self.worker_dies, self.worker_fails, self.worker_hangs, self.checkpoint_dies]
            choices += [self.node_dies, self.agent_dies, self.agent_is_terminated, self.drain, self.node_freezes]
            choices += [self.node_stalls, self.two_die, self.dies_in_a_change]
            choices += [self.dies_without_controller] + [self.burst] * 3
            if self.wanted >= len(self.slots):
                # No spare takes its place while it is started anew.
                choices += [self.newcomer_dies]
            if self.network is not None:
                choices += [self.cut_from_peers, self.cut_from_all, self.cut_from_controller, self.two_apart]
        event = self.rng.choice(choices)
        started_s = time.time()
        event()
        self.settle()
        whole_s = time.time() - started_s
        happened = Happened(event.__name__, self._gap_s(started_s), whole_s)
        self.story.append(happened)
        return happened

    def settle(self, *, kept_out: int = 0) -> None:
        """Wait until as many nodes as there should be train together, each worker having done a step since now."""
        expected = min(self.wanted, max(len(self.slots) - kept_out, 1))
        mark_s = time.time()
        limit_s = time.monotonic() + PATIENCE_S
        while not self._trains(expected, mark_s):
            assert time.monotonic() < limit_s, self.words(f"{expected} nodes of {self.slots} do not train")
            time.sleep(0.05)
        for name, well in list(self.leaving.items()):
            code = self.agents.exit_code(name)
            assert not well or code == 0, self.words(f"{name} ended with {code}")
            del self.leaving[name]

    def _trains(self, expected: int, mark_s: float) -> bool:
        rows = self._newest()
        nodes = sorted({row.node for row in rows})
        if len(nodes) != expected or not set(nodes) <= set(self.slots):
            return False
        world = sum(self.slots[name] for name in nodes)
        if {row.rank for row in rows if row.time_s > mark_s} != set(range(world)):
            return False
        # In the order of their ranks.
        self.members = list(dict.fromkeys(row.node for row in sorted(rows, key=lambda row: row.rank)))
        return {row.world_size for row in rows} == {world}

    def _newest(self) -> list[Row]:
        rows = self.agents.rows()
        newest = max((row.generation for row in rows), default=0)
        return [row for row in rows if row.generation == newest]

    def _gap_s(self, since_s: float) -> float:
        times = [row.time_s for row in self.agents.rows()]
        first = next((i for i, time_s in enumerate(times) if time_s > since_s), len(times))
        window = times[max(first - 1, 0) :]
        return max((later - earlier for earlier, later in itertools.pairwise(window)), default=0.0)

    def words(self, what: str) -> str:
        """What has happened so far, for a failure, and where everybody is."""
        for name in self.slots:
            for pid in self.agents.worker_pids(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)
        time.sleep(1.0)
        events = ""
        with suppress(Exception):
            events = "\n".join(map(str, self.controller.ask("events", "job")[-60:]))
        names = ", ".join(f"{one.name}" for one in self.story[-8:])
        return self.agents.story(f"{what}, at {time.time():.2f}; events so far: {len(self.story)}, {names}\n{events}")

    # -- who may be hit
    # -----------------------------------------------------------------------------------------------

    def _some_members(self, count: int) -> list[str]:
        return self.rng.sample(sorted(self.members), count)

    def _anybody(self) -> str:
        """A member or a spare."""
        return self.rng.choice(sorted(self.slots))

    def _local_rank(self, name: str) -> int:
        return self.rng.randrange(self.slots[name])

    def _kill_worker(self, name: str) -> None:
        self._hit(name, self._local_rank(name), signal.SIGKILL)

    def _stop_worker(self, name: str) -> None:
        self._hit(name, self._local_rank(name), signal.SIGSTOP)

    def _kill_node(self, name: str) -> None:
        self.agents.kill_node(name)
        self._gone(name)

    def _kill_agent(self, name: str) -> None:
        self.agents.signal(name, signal.SIGKILL)
        self._gone(name)

    def _terminate_agent(self, name: str) -> None:
        self.agents.signal(name, signal.SIGTERM)
        self._gone(name)
        # Torch's own agent ends with an error when a signal ends it.
        self.leaving[name] = name not in self.stock

    def _start_node(self) -> None:
        name, slots, stock = f"n{self._count}", self.rng.choice([1, 1, 2]), self.rng.random() < 0.5
        self._count += 1
        if self.network is not None:
            self.network.add(name)
        self.job.start(name, slots, stock=stock)
        self.slots[name] = slots
        if stock:
            self.stock.add(name)

    def _restart_controller(self, _: str) -> None:
        with self._without_controller():
            pass

    def _add(self, _: str) -> None:
        if len(self.slots) < MAX_NODES:
            self._start_node()

    def _hit(self, name: str, local_rank: int, number: signal.Signals) -> None:
        pids = self.agents.worker_pids(name)
        if local_rank < len(pids):
            os.kill(pids[local_rank], number)

    @contextmanager
    def _without_controller(self) -> Iterator[None]:
        self.controller.kill()
        yield
        time.sleep(self.rng.uniform(0.0, 3.0))
        self.controller.start()

    # -- the events
    # ---------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """One or two new nodes."""
        for _ in range(self.rng.randint(1, min(2, MAX_NODES - len(self.slots)))):
            self._start_node()

    def controller_dies(self) -> None:
        self._restart_controller("")

    def worker_dies(self) -> None:
        self._kill_worker(self._anybody())

    def worker_fails(self) -> None:
        """A worker raises, or ends, at some point of a step."""
        (name,) = self._some_members(1)
        local_rank = self._local_rank(name)
        self.job.inject(name, self.rng.choice(IN_A_STEP), self.rng.choice(WAYS_TO_END), local_rank=local_rank)
        self.job.struck(name, local_rank)

    def worker_hangs(self) -> None:
        """SIGSTOP at some point of a step; its agent is well."""
        (name,) = self._some_members(1)
        local_rank = self._local_rank(name)
        self.job.inject(name, self.rng.choice(IN_A_STEP), "STOP", local_rank=local_rank)
        self.job.struck(name, local_rank)

    def checkpoint_dies(self) -> None:
        """Rank 0 ends while it writes a checkpoint."""
        name = self.members[0]
        self.job.inject(name, self.rng.choice(IN_A_CHECKPOINT), self.rng.choice(WAYS_TO_END))
        self.job.struck(name)

    def node_dies(self) -> None:
        self._kill_node(self._anybody())

    def agent_dies(self) -> None:
        """Its workers end with it."""
        self._kill_agent(self._anybody())

    def agent_is_terminated(self) -> None:
        """SIGTERM, as when a machine is taken away with notice."""
        self._terminate_agent(self._anybody())

    def drain(self) -> None:
        name = self._anybody()
        self.controller.ask("drain", "job", name)
        self._gone(name)
        self.leaving[name] = True

    def scale(self) -> None:
        self.wanted = self.rng.randint(1, MAX_NODES)
        self.controller.ask("scale", "job", str(self.wanted))

    def pause(self) -> None:
        """Pause and resume; in between, perhaps, something else."""
        self.controller.ask("pause", "job")
        self.job.until(lambda: self.controller.ask("show", "job")["phase"] == "paused", "the job was not paused")
        step = self.job.step()
        time.sleep(self.rng.uniform(0.0, 1.0))
        meanwhile = self.rng.choice(["nothing", "nothing", "controller", "worker", "node"])
        if meanwhile == "controller":
            self.controller_dies()
        elif meanwhile == "worker" and len(self.members) > 1:
            self._kill_worker(self._anybody())
        elif meanwhile == "node" and len(self.members) > 1:
            self.node_dies()
        assert self.job.step() == step, self.words("a paused job took a step")
        self.controller.ask("resume", "job")

    def node_freezes(self) -> None:
        """Agent and workers are stopped until the others go on without them, and then return."""
        (name,) = self._some_members(1)
        slots = self._freeze(name)
        self.settle()
        time.sleep(self.rng.uniform(0.0, 3.0))
        self.agents.signal_node(name, signal.SIGCONT)
        self.slots[name] = slots

    def node_stalls(self) -> None:
        """Agent and workers are stopped for a while that may or may not be too long."""
        (name,) = self._some_members(1)
        slots = self._freeze(name)
        time.sleep(self.rng.uniform(0.2, 8.0))
        self.agents.signal_node(name, signal.SIGCONT)
        self.slots[name] = slots

    def _freeze(self, name: str) -> int:
        self.agents.signal_node(name, signal.SIGSTOP)
        return self.slots.pop(name)

    def cut_from_peers(self) -> None:
        """The controller hears everybody; those that can reach each other go on."""
        (name,) = self._some_members(1)
        self._network.cut([name], set(self.slots) - {name})
        self.settle(kept_out=1)
        self._network.heal()

    def cut_from_all(self) -> None:
        (name,) = self._some_members(1)
        self._network.cut([name], {CONTROLLER, *self.slots} - {name})
        slots = self.slots.pop(name)
        self.settle()
        self._network.heal()
        self.slots[name] = slots

    def cut_from_controller(self) -> None:
        """Some nodes, or all."""
        names = self.rng.sample(sorted(self.slots), self.rng.randint(1, len(self.slots)))
        self._network.cut([CONTROLLER], names)
        time.sleep(self.rng.uniform(0.2, 8.0))
        self._network.heal()

    def two_apart(self) -> None:
        """Two members cannot reach each other, for a while that may or may not be too long."""
        one, other = self._some_members(2)
        self._network.cut([one], [other])
        time.sleep(self.rng.uniform(0.2, 8.0))
        self._network.heal()

    @property
    def _network(self) -> Network:
        assert self.network is not None, "events of the network need one"
        return self.network

    def two_die(self) -> None:
        """Within a tenth of a second; one of them rank 0, now and then; never all who have the state."""
        names = self._some_members(min(2, len(self.members) - 1))
        if self.rng.random() < 0.5 and self.members[0] not in names:
            names[0] = self.members[0]
        for name in names:
            self.rng.choice([self._kill_worker, self._kill_node])(name)
            time.sleep(self.rng.uniform(0.0, 0.1))

    def dies_in_a_change(self) -> None:
        """One node's worker is killed, and while the survivors meet again, one of these ends, too."""
        if len(self.members) < 3:
            self.two_die()
            return
        first, second = self._some_members(2)
        point = self.rng.choice(IN_A_CHANGE)
        local_rank = self._local_rank(second)
        self.job.inject(second, point, self.rng.choice((*WAYS_TO_END, "STOP")), local_rank=local_rank)
        self._kill_worker(first)
        self.job.struck(second, local_rank)

    def newcomer_dies(self) -> None:
        """A worker is killed, and once more while it is given the state."""
        (name,) = self._some_members(1)
        local_rank = self._local_rank(name)
        self._hit(name, local_rank, signal.SIGKILL)
        point = self.rng.choice((*IN_A_CHANGE, "load"))
        self.job.inject(name, point, self.rng.choice((*WAYS_TO_END, "STOP")), local_rank=local_rank)
        self.job.struck(name, local_rank)

    def dies_without_controller(self) -> None:
        """A worker, a node or an agent ends while the controller is away."""
        with self._without_controller():
            time.sleep(self.rng.uniform(0.0, 1.0))
            self.rng.choice([self.worker_dies, self.node_dies, self.agent_dies, self.agent_is_terminated])()

    def burst(self) -> None:
        """Several things within a second or two, one member being spared: it always has the state."""
        spared = self.rng.choice(sorted(self.members))
        for _ in range(self.rng.randint(2, 5)):
            others = sorted(set(self.slots) - {spared})
            acts: list[Callable[[str], None]] = [self._kill_worker, self._stop_worker]
            acts += [self._kill_node, self._kill_agent, self._terminate_agent] if len(others) > 1 else []
            what = self.rng.choice([*acts, self._restart_controller, self._add])
            what(self.rng.choice(others) if others else "")
            time.sleep(self.rng.choice([0.0, 0.1, 0.3, 1.0]))

    def _gone(self, name: str) -> None:
        del self.slots[name]
        self.members = [one for one in self.members if one != name]
