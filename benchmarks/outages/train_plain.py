"""A DDP script as torchrun's users write it: it begins anew in every process. usage: train_plain.py JSON-OF-OPTIONS"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).parents[1]))
from outages.models import BATCH, INPUTS, make_model
from outages.worker_log import WorkerLog

options = json.loads(sys.argv[1])
torch.set_num_threads(1)
log = WorkerLog()
dist.init_process_group("gloo")
model = DistributedDataParallel(make_model(options["parameters"]))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
inputs = torch.randn(BATCH, INPUTS)
step = 0
while True:
    asked_s = time.monotonic()
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
    step += 1
    log.step(asked_s, rank=dist.get_rank(), world_size=dist.get_world_size(), generation=0, step=step)
    time.sleep(options["pace_s"])
