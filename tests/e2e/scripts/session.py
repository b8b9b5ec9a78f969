"""A worker that only has a session. usage: session.py MODE FLUSH_LIMIT_S

blocked: the main thread waits in C, as in a collective. left: it has left. Prints "ready" once it is so far.
"""

import socket
import sys

from stretto.session import Session, SessionSettings
from stretto_proto.v1 import types_pb2

settings = SessionSettings(drain_limit_s=2.0, flush_limit_s=float(sys.argv[2]))
session = Session.from_environment(types_pb2.JobSpec(), settings)
assert session is not None
print("ready", flush=True)
if sys.argv[1] == "left":
    session.left(7)
    session.wait_until_stopped()
else:
    # Restarted after a signal, like a collective: Python runs no handler meanwhile.
    listener = socket.create_server(("127.0.0.1", 0))
    while True:
        try:
            listener.accept()
        except InterruptedError:
            continue
