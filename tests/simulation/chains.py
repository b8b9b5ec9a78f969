"""Chains of faults that lead to where a first design of the protocol went wrong (`setup.CHAINS` says how often).

Single faults at random seldom meet there: a generation that trains on unseen while another begins, a step that one rank
alone has done and then gives away, a controller that dies between deciding and saving.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from simulation.setup import unseen_s

if TYPE_CHECKING:
    from simulation.faults import Faults
    from simulation.worker import Worker

# How often a chain looks whether it can go on.
_LOOK_S = 0.3


def unseen_generation(faults: Faults) -> None:
    """All members lose the controller and train on; others begin without them; then the old ones are seen again.

    By then those others train, or have all died; or they have not even begun.
    """
    faults.lie_in_wait("moved", faults.world.rng.randint(1, 12), partial(_out_of_sight, faults))


def _out_of_sight(faults: Faults, worker: Worker | None) -> None:
    world, rng = faults.world, faults.world.rng
    members = faults.members()
    if not members:
        return
    lost_s = unseen_s(world.setup.limits)
    faults.cut_off(members, (0, 1), lost_s * rng.uniform(0.7, 1.4) + rng.uniform(1.0, 4.0))
    strangers = [name for _ in range(rng.randint(world.setup.min_nodes, 2)) if (name := faults.join()) is not None]
    if rng.random() < 0.8:
        await_strangers(faults, members, strangers, rng.randint(0, 6))


def await_strangers(faults: Faults, members: list[str], strangers: list[str], steps: int) -> None:
    """When those who came later have made so many steps, the old ones are seen again."""
    world, rng = faults.world, faults.world.rng
    own = [w for w in world.live_workers() if w.node_id in strangers]
    if faults.over:
        return
    if not own or any(w.state.version.step == 0 or w.steps < steps for w in own):
        world.scheduler.after(_LOOK_S, await_strangers, faults, members, strangers, steps)
        return
    if rng.random() < 0.4:
        for name in strangers:
            faults.power_off(name) if rng.random() < 0.3 else faults.kill_node(name)
    cut = {(name, direction) for name in members for direction in (0, 1)}
    world.scheduler.after(rng.choice((0.0, 0.2, 1.5)), faults.reconnect, cut)


def lone_step(faults: Faults) -> None:
    """A collective succeeds on one rank, and somebody dies before it does on the others; then, perhaps, the source."""
    rng = faults.world.rng
    faults.lie_in_wait("first-step", rng.randint(0, 5), partial(_somebody_dies, faults), at_once=rng.random() < 0.8)


def _somebody_dies(faults: Faults, worker: Worker | None) -> None:
    rng = faults.world.rng
    others = [w for w in faults.world.live_workers() if w is not worker and w.group is not None]
    if others and rng.random() < 0.8:
        faults.kill_worker(rng.choice(others))
        if rng.random() < 0.8:
            faults.lie_in_wait("first-transfer", 0, partial(_source_dies, faults, 0.9), at_once=True)
    elif worker is not None:
        faults.kill_worker(worker)


def source_dies(faults: Faults) -> None:
    """Who gives its state away dies while it sends, perhaps together with who has it first."""
    rng = faults.world.rng
    for _ in range(rng.randint(1, 2)):
        moment = rng.choice(("transfer", "first-transfer", "first-transfer", "agree"))
        faults.lie_in_wait(moment, rng.randint(0, 4), partial(_source_dies, faults, 0.3))
    # Somebody comes, so that there is something to send.
    faults.lie_in_wait("moved", rng.randint(0, 6), partial(_somebody_comes, faults))


def _somebody_comes(faults: Faults, worker: Worker | None) -> None:
    faults.join()


def _source_dies(faults: Faults, with_receiver: float, worker: Worker | None) -> None:
    if worker is None or worker.state.assignment is None:
        return
    place, world, rng = worker.state.assignment, faults.world, faults.world.rng
    ports = [each.preflight_port for each in place.places]
    source = world.by_port[ports[max(place.source_rank, 0)]]
    # Some have the last part of it, and some never will.
    delay_s = world.setup.transfer_s * rng.random() if worker is source else 0.0
    world.scheduler.after(delay_s, faults.kill_worker, source)
    if worker is not source and rng.random() < with_receiver:
        # Before it has taken the state, or as soon as it has, and has said so to nobody.
        world.scheduler.after(rng.choice((0.0, 0.0002, 0.001)), faults.kill_worker, worker)


def crash_in_decision(faults: Faults) -> None:
    """The controller dies after a generation has been decided on: before it is saved, or sent, or heard of by all."""
    rng = faults.world.rng
    for _ in range(rng.randint(1, 2)):
        faults.lie_in_wait("begun", rng.randint(0, 3), partial(_crash, faults))


def _crash(faults: Faults, worker: Worker | None) -> None:
    world, rng = faults.world, faults.world.rng
    if rng.random() < 0.5:
        names = [agent.node_id for agent in world.agents if agent.alive]
        faults.cut_off([rng.choice(names)], rng.choice(((0,), (1,), (0, 1))), rng.choice((0.5, 3.0, 9.0)))
    delay_s = rng.choice((0.0, 0.001, 0.002, 0.004, 0.01, 0.05)) * rng.uniform(0.5, 1.5)
    world.scheduler.after(delay_s, faults.kill_controller, rng.choice((0.05, 0.3, 1.0)))


def answered_twice(faults: Faults) -> None:
    """A request is said twice, and answered twice; the second answer comes late, and what it gives out is over."""
    faults.says_twice = True
    for _ in range(2):
        faults.lie_in_wait("begun", faults.world.rng.randint(0, 3), partial(_answers_are_lost, faults))


def _answers_are_lost(faults: Faults, worker: Worker | None) -> None:
    """The streams break before the answers come; the workers ask again on new ones."""
    faults.blip(1.0)
    faults.lie_in_wait(
        "assigned", faults.world.rng.randint(0, 1), partial(_second_answer_is_late, faults), at_once=True
    )


def _second_answer_is_late(faults: Faults, worker: Worker | None) -> None:
    if worker is None or worker.state.assignment is None:
        return
    world, rng = faults.world, faults.world.rng
    faults.cut_off([worker.node_id], (1,), rng.uniform(0.2, 1.0))
    others = [world.by_port[place.preflight_port] for place in worker.state.assignment.places]
    others = [other for other in others if other is not worker]
    if others:
        world.scheduler.after(rng.random() * 0.1, faults.kill_worker, rng.choice(others))


def outage(faults: Faults) -> None:
    """The controller's own network is away for a while: all streams end together. Meanwhile a member may really die."""
    faults.lie_in_wait("moved", faults.world.rng.randint(1, 15), partial(_network_away, faults))


def _network_away(faults: Faults, worker: Worker | None) -> None:
    world, rng = faults.world, faults.world.rng
    grace_s = world.setup.limits.recovery_grace_s
    # Mostly longer than a closed stream is forgiven at other times.
    duration_s = rng.uniform(0.5, 0.8 * grace_s) if rng.random() < 0.5 else rng.uniform(0.5, 0.8) * grace_s
    faults.outage(duration_s)
    if rng.random() < 0.4 and worker is not None:
        world.scheduler.after(rng.random() * duration_s, faults.kill_worker, worker)


def half_a_node(faults: Faults) -> None:
    """All are out of sight; one node comes back with one worker before the other, when others could begin already."""
    faults.lie_in_wait("moved", faults.world.rng.randint(3, 12), partial(_come_back_by_halves, faults))


def _come_back_by_halves(faults: Faults, worker: Worker | None) -> None:
    world, rng = faults.world, faults.world.rng
    if worker is None:
        return
    faults.kill_controller(rng.uniform(0.05, 0.5))
    for other in faults.members():
        if other != worker.node_id:
            faults.kill_node(other)
    for each in worker.agent.workers:
        if rng.random() < 0.7:
            world.scheduler.after(rng.random() * 0.5, faults.freeze, each, rng.uniform(0.5, 4.0))
    for _ in range(rng.randint(1, 3)):
        faults.join()


def last_holders_go(faults: Faults) -> None:
    """All who hold the state have SIGTERM, one after the other, some while they train and some while they wait."""
    faults.lie_in_wait("moved", faults.world.rng.randint(2, 12), partial(_all_go, faults))


def _all_go(faults: Faults, worker: Worker | None) -> None:
    world, rng = faults.world, faults.world.rng
    agents = [agent for agent in world.agents if agent.alive and not agent.leaving]
    rng.shuffle(agents)
    spread_s = rng.choice((0.05, 0.5, 3.0))
    dies = rng.random() < 0.5
    for position, agent in enumerate(agents):
        last = position == len(agents) - 1
        if dies and not last:
            faults.kill_node(agent.node_id)
        else:
            world.scheduler.after(spread_s * rng.random() + spread_s * last, faults.sigterm, agent)


def apart_for_good(faults: Faults) -> None:
    """One node and another can never reach each other again: those go on who can, and they are enough."""
    world, rng = faults.world, faults.world.rng
    count = len(world.setup.slots)
    if count - 1 < world.setup.min_nodes:
        return
    one, other = rng.sample(range(count), 2)
    pairs = [(f"n{one}", f"n{other}"), (f"n{other}", f"n{one}")][: rng.randint(1, 2)]
    world.scheduler.after(rng.choice((0.0, rng.random() * 5.0)), faults.part_for_good, pairs)


CHAINS: dict[str, Callable[[Faults], None]] = {
    chain.__name__: chain
    for chain in (
        unseen_generation,
        lone_step,
        source_dies,
        crash_in_decision,
        answered_twice,
        outage,
        half_a_node,
        last_holders_go,
        apart_for_good,
    )
}
