"""A live worker without torch that takes its place and trains nothing. usage: raw_live.py

A row for each assignment, logged as allreduce.py does. Once there is a file `finish` beside the log, members say that
the target is reached, and end. After a SIGTERM a worker leaves with its generation, and ends with 0.
"""

import json
import os
import queue
import signal
import threading
import time
from typing import Any

import grpc
from stretto.rendezvous.sign_in import sign_in
from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1.training_pb2_grpc import TrainingStub

log_file = open(os.path.join(os.environ["WORKER_LOG_DIR"], f"{os.getpid()}.jsonl"), "a", buffering=1)  # noqa: SIM115
finish = os.path.join(os.environ["WORKER_LOG_DIR"], "finish")
requests: queue.SimpleQueue[pb.TrainRequest] = queue.SimpleQueue()
asked = 0
generation = 0
terminated = False


def say(**body: Any) -> None:
    requests.put(pb.TrainRequest(**body))


def question() -> pb.WorkerReady:
    global asked
    asked += 1
    return pb.WorkerReady(request_id=asked, generation=generation, store_port=1, preflight_port=2)


def ask() -> None:
    say(ready=question())
    if terminated:
        time.sleep(0.2)
        os._exit(0)


def on_sigterm(*_: object) -> None:
    global terminated
    terminated = True
    say(draining=pb.WorkerDraining(generation=generation))
    # Nobody may be there to ask this worker to leave.
    threading.Timer(2.0, os._exit, (0,)).start()


def live() -> None:
    while True:
        time.sleep(0.1)
        say(alive=pb.WorkerAlive(generation=generation))
        if generation and os.path.exists(finish):
            say(finished=pb.WorkerFinished(generation=generation, step=1, tau=1.0))
            time.sleep(0.5)
            os._exit(0)


def hear(answers: Any) -> None:
    global generation
    for answer in answers:
        if answer.HasField("assignment"):
            generation = answer.assignment.generation
            row = {
                "time_s": time.time(),
                "pid": os.getpid(),
                "node": os.environ["WORKER_NODE"],
                "rank": answer.assignment.rank,
                "world_size": len(answer.assignment.places),
                "generation": generation,
                "restarts": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
                "step": 0,
            }
            log_file.write(json.dumps(row) + "\n")
        elif answer.HasField("leave") or answer.HasField("cut") or answer.HasField("fenced"):
            ask()
    # The controller has ended the stream: this worker is not wanted.
    os._exit(0 if terminated else 1)


sign_in()
signal.signal(signal.SIGTERM, on_sigterm)
hello = pb.WorkerHello(
    protocol_version=1,
    job=os.environ["STRETTO_JOB"],
    node_id=os.environ["STRETTO_NODE"],
    rank=-1,
    local_rank=int(os.environ["LOCAL_RANK"]),
    ready=question(),
)
say(hello=hello)
channel = grpc.insecure_channel(os.environ["STRETTO_ENDPOINT"])
stream = TrainingStub(channel).Train(iter(requests.get, None), wait_for_ready=True)
threading.Thread(target=hear, args=(stream,), daemon=True).start()
threading.Thread(target=live, daemon=True).start()
while True:
    signal.pause()
