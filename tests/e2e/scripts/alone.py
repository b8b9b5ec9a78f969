"""A worker without torch, quick to start, that speaks to nobody: only its agent can end it.

usage: alone.py [SECONDS [EXIT_CODE]]; without SECONDS it goes on for ever. Logs as allreduce.py does.
"""

import json
import os
import sys
import time

log_file = open(os.path.join(os.environ["WORKER_LOG_DIR"], f"{os.getpid()}.jsonl"), "a", buffering=1)  # noqa: SIM115
end_s = time.time() + float(sys.argv[1] if len(sys.argv) > 1 else "inf")
step = 0
while time.time() < end_s:
    row = {
        "time_s": time.time(),
        "pid": os.getpid(),
        "node": os.environ["WORKER_NODE"],
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
        "generation": int(os.environ["STRETTO_GENERATION"]),
        "restarts": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
        "step": step,
    }
    log_file.write(json.dumps(row) + "\n")
    step += 1
    time.sleep(0.05)
sys.exit(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
