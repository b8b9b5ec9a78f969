"""The way into a live session for training loops of one's own."""

from __future__ import annotations

import torch
from stretto_proto.v1 import types_pb2

from stretto.live.session import LiveSession
from stretto.live.settings import LiveSettings


def join(
    *,
    base_batch_size: int,
    batch_size: int = 0,
    global_batch_size: int = 0,
    target_tau: float,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    settings: LiveSettings | None = None,
) -> LiveSession:
    """This process's session, for a training loop of your own; see the example in `stretto.live`.

    The batch sizes, in samples, are those of ElasticTrainer: batch_size per worker, or global_batch_size in all.
    device: where the model is, such as f"cuda:{os.environ['LOCAL_RANK']}"; every worker needs a GPU of its own.
    backend: "nccl" or "gloo" for what is on it, None for nccl on GPUs; the same on all workers. Raises RuntimeError
    in a process that no agent has started in in-process mode.
    """
    spec = types_pb2.JobSpec(
        base_batch_size=base_batch_size,
        batch_size=batch_size,
        global_batch_size=global_batch_size,
        target_tau=target_tau,
    )
    session = LiveSession.from_environment(spec, settings, device=device, backend=backend)
    if session is None:
        raise RuntimeError(
            "this process was not started by an agent in in-process mode: start the script with `stretto run`, or "
            "with `torchrun --rdzv-backend=stretto --rdzv-conf=reconfigure=in-process`"
        )
    return session
