"""An ElasticTrainer whose workers can fail at chosen points. usage: live.py DIRECTORY JSON-OF-OPTIONS

DIRECTORY gets checkpoints, `samples` (the log of committed sample indices), `losses-*.jsonl`, and `states-*.jsonl`:
fingerprints of model and optimizer after the first step of each generation, and now and then. A file
DIRECTORY/fault-NODE-LOCAL_RANK holds the fault that the node's worker carries out when it gets there; it is removed
first. A file DIRECTORY/last-step holds the step that is to reach the target.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from stretto import ElasticTrainer
from stretto.checkpoint import Checkpointer
from stretto.checkpoint.commit import Committer
from stretto.checkpoint.shard_writer import ShardWriter
from stretto.group import Group, GroupLife
from stretto.live import Generation, LiveSession
from stretto.trainer_settings import TrainerSettings
from stretto.transfer import fingerprint
from torch.utils.data import TensorDataset

directory = Path(sys.argv[1])
options: dict[str, Any] = {
    "target_tau": 1e9,
    "samples": 101,
    "batch_size": 4,
    "base_batch_size": 4,
    "rule": "adascale",
    "lr": 0.02,
    "global_batch_size": None,
    "width": 16,
    "num_workers": 0,
    "pace_s": 0.01,
    "layers": "plain",
    "compile": False,
    "seed": None,
    "checkpoint_steps": 25,
    "leave_at": None,
    "live": {},
    **json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"),
}
node = os.environ["WORKER_NODE"]
rows = open(Path(os.environ["WORKER_LOG_DIR"]) / f"{os.getpid()}.jsonl", "a", buffering=1)  # noqa: SIM115
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s: %(message)s")
faulthandler.register(signal.SIGUSR1)  # a test that fails asks where everybody is
torch.set_num_threads(1)
sending = False


def strike(point: str, step: int) -> None:
    """Carry out the fault that waits for this node at this point, if there is one, and the step has come."""
    path = directory / f"fault-{node}-{os.environ['LOCAL_RANK']}"
    try:
        fault = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    if fault["point"] != point or step < fault.get("step", 0):
        return
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.with_name("done-" + path.name))
        if fault["kind"] == "raise" and threading.current_thread() is not threading.main_thread():
            os._exit(1)  # where a checkpoint is written, an error alone ends nobody
        if fault["kind"] == "raise":
            raise RuntimeError(f"injected at {point}")
        if fault["kind"] == "sleep":
            time.sleep(4.0)
            return
        if fault["kind"] == "memory":
            os.write(2, b"out of memory\n")
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.Signals[f"SIG{fault['kind']}"])


class Optimizer(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        strike("optimizer", trainer_step())
        return super().step(closure)


class Slow:
    """State whose reading is a point of its own: inside a checkpoint, or where a source begins to send."""

    def state_dict(self) -> dict[str, Any]:
        strike("state", trainer_step())
        return {"filler": torch.zeros(options["width"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        strike("load", trainer_step())


def trainer_step() -> int:
    return trainer.step if "trainer" in globals() else 0


def hook(owner: type, name: str, before: str | None = None, after: str | None = None, **only: Any) -> None:
    """Strike before or after a method, where it is called with these keyword arguments."""
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        strikes = only.items() <= kwargs.items()
        if before and strikes:
            strike(before, trainer_step())
        result = original(*args, **kwargs)
        if after and strikes:
            strike(after, trainer_step())
        return result

    setattr(owner, name, replaced)


hook(Checkpointer, "begin", before="before checkpoint")
hook(ShardWriter, "finish", after="after share")
hook(Committer, "commit", after="after checkpoint")
hook(Group, "all_reduce", after="all_reduce")
hook(Group, "broadcast", after="broadcast")
hook(Group, "all_to_all", after="all_to_all")
hook(Generation, "all_reduce", after="bucket", more=True)
hook(GroupLife, "build", before="before build", after="after build")
hook(LiveSession, "ask", after="ask")


class RunningMean(torch.nn.Module):
    """The part of a batch norm that has a buffer, for batches of any size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(inputs.mean(dim=0), 0.1)
        return inputs - self.mean


generator = torch.Generator().manual_seed(5)
inputs = torch.randn(options["samples"], 6, generator=generator, dtype=torch.float64)
targets = inputs.sum(dim=1, keepdim=True) + torch.sin(9 * inputs[:, :1])
torch.manual_seed(os.getpid() if options["seed"] is None else options["seed"])  # workers differ on purpose
width = options["width"]
layers: dict[str, list[torch.nn.Module]] = {
    "plain": [],
    "dropout": [torch.nn.Dropout(0.2)],
    "running_mean": [RunningMean(width)],
}
model: torch.nn.Module = torch.nn.Sequential(
    torch.nn.Linear(6, width), *layers[options["layers"]], torch.nn.Tanh(), torch.nn.Linear(width, 1)
).double()
if options["compile"]:
    model = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]


def loss_fn(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    strike("forward", trainer_step())
    loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    loss.register_hook(lambda grad: strike("backward", trainer_step()))  # type: ignore[no-untyped-call]  # torch's own
    return loss


trainer = ElasticTrainer(
    model,
    Optimizer(model.parameters(), lr=options["lr"], momentum=0.9),
    TensorDataset(inputs, targets),
    loss_fn,
    base_batch_size=options["base_batch_size"],
    rule=options["rule"],
    batch_size=options["batch_size"],
    global_batch_size=options["global_batch_size"],
    target_tau=options["target_tau"],
    checkpoint=directory / "checkpoints",
    settings=TrainerSettings(
        checkpoint_interval_s=None,
        checkpoint_interval_steps=options["checkpoint_steps"],
        sample_log=directory / "samples",
        dataloader={"num_workers": options["num_workers"]},
        extra_state={"slow": Slow()},
        **options["live"],
    ),
)


def last_step() -> float:
    try:
        return float((directory / "last-step").read_text())
    except (OSError, ValueError):
        return float("inf")


losses = open(directory / f"losses-{os.getpid()}.jsonl", "a", buffering=1)  # noqa: SIM115
states = open(directory / f"states-{os.getpid()}.jsonl", "a", buffering=1)  # noqa: SIM115
known_generation = 0
for report in trainer:
    row = {
        "time_s": time.time(),
        "pid": os.getpid(),
        "node": node,
        "rank": trainer.rank,
        "world_size": report.world_size,
        "generation": report.generation,
        "restarts": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
        "step": report.step,
    }
    if options["compile"]:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        (directory / f"graphs-{os.getpid()}").write_text(str(graphs))
    rows.write(json.dumps(row) + "\n")
    losses.write(json.dumps({"step": report.step, "tau": report.tau, "loss": report.loss}) + "\n")
    if report.generation > known_generation or report.step % 20 == 0:
        known_generation = report.generation
        state = {"model": trainer.model.state_dict(), "optimizer": trainer._optimizer.state_dict()}
        if options["rule"] == "adasum-delta":
            state["optimizer"].pop("state")  # every rank's own
        entry = {"generation": report.generation, "step": report.step, "state": fingerprint(state)}
        states.write(json.dumps(entry) + "\n")
    if report.step >= last_step():
        # As if tau had reached the target with this step, on every rank.
        trainer._target_tau = 0.0
    if report.step == options["leave_at"]:
        trainer.save()
        break
    pace = directory / "pace"
    time.sleep(float(pace.read_text()) if pace.exists() else options["pace_s"])
