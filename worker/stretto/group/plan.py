"""What a generation is built from: its members in rank order, and the limits on everything that waits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """One worker process of a generation, as the controller describes it to every other one."""

    address: str  # a numeric IP address: looking a name up cannot be cancelled
    store_port: int  # of the store that this member serves, used when it leads
    preflight_port: int  # where it answers which generation it is in
    node: str = ""  # its agent; workers of one node have equal names. Empty: a node of its own

    def __post_init__(self) -> None:
        try:
            ipaddress.ip_address(self.address)
        except ValueError as error:
            raise ValueError(
                f"a member's address must be a numeric IP address such as 10.0.0.7 or fd00::7, not {self.address!r}: "
                "resolve the name before handing it out"
            ) from error
        for name, port in (("store_port", self.store_port), ("preflight_port", self.preflight_port)):
            if not 0 < port < 65536:
                raise ValueError(f"a member's {name} must be from 1 to 65535, not {port}")


@dataclass(frozen=True)
class Plan:
    """One generation as one member sees it: everybody's plan is equal but for `rank`."""

    generation: int  # at least 1; only grows
    rank: int
    members: tuple[Member, ...]  # index: rank
    leader: int = 0  # the rank whose store the others connect to

    def __post_init__(self) -> None:
        if self.generation < 1:
            raise ValueError(f"generations are numbered from 1, not {self.generation}")
        for name, rank in (("rank", self.rank), ("leader", self.leader)):
            if not 0 <= rank < len(self.members):
                raise ValueError(f"{name} {rank} is not one of the {len(self.members)} members, whose ranks begin at 0")

    @property
    def world_size(self) -> int:
        return len(self.members)

    @property
    def peers(self) -> tuple[int, ...]:
        """Every rank but ours."""
        return tuple(rank for rank in range(self.world_size) if rank != self.rank)

    def environment(self) -> dict[str, str]:
        """The variables of torchrun for this generation: what libraries read to learn rank and world size."""
        names = [member.node or f"rank {rank}" for rank, member in enumerate(self.members)]
        nodes = list(dict.fromkeys(names))
        own, leader = names[self.rank], self.members[self.leader]
        rank, world_size = str(self.rank), str(self.world_size)
        return {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": str(names[: self.rank].count(own)),
            "LOCAL_WORLD_SIZE": str(names.count(own)),
            "GROUP_RANK": str(nodes.index(own)),
            "GROUP_WORLD_SIZE": str(len(nodes)),
            "ROLE_RANK": rank,
            "ROLE_WORLD_SIZE": world_size,
            "MASTER_ADDR": leader.address,
            "MASTER_PORT": str(leader.store_port),
        }


@dataclass(frozen=True)
class GroupSettings:
    """Limits on everything here that waits, in seconds."""

    formation_limit_s: float = 10.0  # a build that took longer has failed
    # To another member, before it counts as out of reach: longer than the second after which a lost packet is sent
    # again. Also of torch's client of the leader's store, which cannot be cancelled.
    connect_timeout_s: float = 1.5
    operation_timeout_s: float = (
        30.0  # of one collective. An operation that a cut leaves stuck pins its tensors so long
    )
    roll_call_s: float = 0.2  # how long peers have to answer when we ask who is still there
    poll_interval_s: float = 0.005  # how often a build looks for a newer assignment
    cut_interval_s: float = 0.015  # how often the sockets of a build that was given up are cut, until it ends
    gpu_interval_s: float = 0.0005  # how often the GPU is asked whether it has done an operation of NCCL
    # A peer that leaves ends gloo's operations by its sockets. One of NCCL that runs for this long fails if a peer is
    # seen to have left.
    left_behind_s: float = 0.5
    linger_s: float = 0.2  # how long NCCL may go on sending what a peer waits for, when we leave as agreed
    stuck_limit_s: float = 5.0  # a cut, a teardown or a rescue that takes longer ends the process

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0 seconds, not {value}")
