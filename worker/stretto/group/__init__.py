"""The life of a process group that is built, cut and rebuilt in a live process while peers die, hang or freeze.

    life = GroupLife(job, address)                         # nccl_device=torch.device("cuda", 0): see below
    ports = life.serve()                                   # tell the controller
    group = life.build(plan, cancelled=newer_assignment)   # Superseded, BuildFailed
    with group.guarded():                                  # GroupBroken, whatever torch raised
        total = group.wait(group.all_reduce(tensor))
    group.cut("the controller says so")                    # from any thread, at any time
    group.abandon()                                        # then build the next generation

Two ideas carry it. Every wait of the training thread is for a future of ours, which a cut fails at once; and whatever
torch waits for inside, another thread can end, because it knows this generation's sockets and can stand in for a peer
that never comes. What torch does in the background after that is nobody's concern: a reaper destroys it.

Tensors travel over gloo, those on a GPU by way of the host; with an `nccl_device` those on that GPU travel over NCCL.
Then a future of ours completes when the GPU has done the operation, and a cut aborts NCCL's part of the group.

Not covered: process groups that a script makes with new_group, and collectives that it calls on torch directly. Their
sockets or futures are not ours; a cut ends those of the default group in nearly all cases, else their timeout does.
"""

from __future__ import annotations

from stretto.group.failures import BuildFailed, GroupBroken, Superseded
from stretto.group.life import GroupLife, Ports
from stretto.group.live import Group
from stretto.group.plan import GroupSettings, Member, Plan

__all__ = [
    "BuildFailed",
    "Group",
    "GroupBroken",
    "GroupLife",
    "GroupSettings",
    "Member",
    "Plan",
    "Ports",
    "Superseded",
]
