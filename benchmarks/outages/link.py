"""How fast this machine's loopback is: bytes per second through one TCP connection between two processes."""

from __future__ import annotations

import multiprocessing
import socket
import time

SIZE_BYTES = 1 << 30
CHUNK_BYTES = 1 << 20


def bytes_per_s() -> float:
    """Measure it once."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = multiprocessing.get_context("spawn").Process(
            target=_send, args=(server.getsockname()[1],), daemon=True
        )
        sender.start()
        connection, _ = server.accept()
        buffer = bytearray(CHUNK_BYTES)
        received = connection.recv_into(buffer)
        start_s = time.monotonic()
        first = received
        while received < SIZE_BYTES:
            received += connection.recv_into(buffer)
        took_s = time.monotonic() - start_s
        connection.close()
        sender.join()
    return (received - first) / took_s


def _send(port: int) -> None:
    chunk = bytes(CHUNK_BYTES)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(SIZE_BYTES // CHUNK_BYTES):
            connection.sendall(chunk)
