"""A small ElasticTrainer. usage: elastic.py DIRECTORY TARGET_TAU [NUM_WORKERS]; logs as allreduce.py does.

DIRECTORY gets checkpoints, and `samples`, the log of committed sample indices. While there is a file `slowly` in it,
steps take their time, so that training does not end before what happens to it.
"""

import json
import os
import sys
import time

import torch
from stretto import ElasticTrainer
from stretto.trainer_settings import TrainerSettings
from torch.utils.data import TensorDataset

log_file = open(os.path.join(os.environ["WORKER_LOG_DIR"], f"{os.getpid()}.jsonl"), "a", buffering=1)  # noqa: SIM115
torch.set_num_threads(1)
directory, target_tau = sys.argv[1], float(sys.argv[2])
num_workers = int(sys.argv[3]) if len(sys.argv) > 3 else 0
inputs = torch.randn(101, 6, generator=torch.Generator().manual_seed(5))
model = torch.nn.Linear(6, 1)
trainer = ElasticTrainer(
    model,
    torch.optim.SGD(model.parameters(), lr=0.01),
    TensorDataset(inputs, inputs.sum(dim=1, keepdim=True) + torch.sin(9 * inputs[:, :1])),
    lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1]),
    base_batch_size=4,
    batch_size=4,
    target_tau=target_tau,
    checkpoint=os.path.join(directory, "checkpoints"),
    settings=TrainerSettings(
        checkpoint_interval_s=None,
        checkpoint_interval_steps=25,
        sample_log=os.path.join(directory, "samples"),
        dataloader={"num_workers": num_workers},
    ),
)
for report in trainer:
    row = {
        "time_s": time.time(),
        "pid": os.getpid(),
        "node": os.environ["WORKER_NODE"],
        "rank": trainer.rank,
        "world_size": report.world_size,
        "generation": report.generation,
        "restarts": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
        "step": report.step,
    }
    log_file.write(json.dumps(row) + "\n")
    time.sleep(0.2 if os.path.exists(os.path.join(directory, "slowly")) else 0.01)
