"""A plain DDP script: nothing in it knows of Stretto, and yet it is elastic.

    torchrun --rdzv-backend=stretto --rdzv-endpoint=127.0.0.1:29400 --rdzv-id=plain --nnodes=1:4 \
             --nproc-per-node=1 --max-restarts=100 examples/plain_ddp.py

At each change of membership the agents start it anew, with new ranks; what it wants to keep, it saves itself.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main(steps: int = 300) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(dist.get_rank())
    for step in range(steps):
        loss = model(torch.randn(32, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 50 == 0:
            print(f"step {step}, {dist.get_world_size()} workers, loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
