"""A worker as users write them: any process group, an all-reduce each step. It knows nothing of Stretto.

usage: allreduce.py [STEPS]; without STEPS it goes on for ever. One JSON line per event in $WORKER_LOG_DIR/PID.jsonl.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist

log_file = open(os.path.join(os.environ["WORKER_LOG_DIR"], f"{os.getpid()}.jsonl"), "a", buffering=1)  # noqa: SIM115
torch.set_num_threads(1)
dist.init_process_group("gloo")
limit = int(sys.argv[1]) if len(sys.argv) > 1 else sys.maxsize
for step in range(limit):
    ranks = torch.zeros(dist.get_world_size())
    ranks[dist.get_rank()] = 1
    dist.all_reduce(ranks)
    assert ranks.eq(1).all(), ranks
    row = {
        "time_s": time.time(),
        "pid": os.getpid(),
        "node": os.environ["WORKER_NODE"],
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "generation": int(os.environ["STRETTO_GENERATION"]),
        "restarts": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
        "step": step,
    }
    log_file.write(json.dumps(row) + "\n")
    time.sleep(0.05)
dist.destroy_process_group()
