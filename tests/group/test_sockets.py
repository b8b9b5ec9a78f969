"""Sockets are found by their ends and cut by inode and ends; nobody else's is touched."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from stretto.group import sockets
from stretto.group.sockets import TcpSocket, endpoint

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["127.0.0.1", "::1"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family) as listener:
        yield listener


def connect(listener: socket.socket) -> Pair:
    connecting = socket.create_connection(listener.getsockname()[:2])
    accepted, _ = listener.accept()
    return connecting, accepted


def end_of(listener: socket.socket) -> sockets.Endpoint:
    return endpoint(*listener.getsockname()[:2])


def test_both_sides_of_a_connection_are_found_by_the_listeners_end_and_it_is_not(
    listener: socket.socket,
) -> None:
    connecting, accepted = connect(listener)
    with connecting, accepted:
        end = end_of(listener)
        found = sockets.find(lambda each: end in (each.local, each.peer))
        inodes = {each.inode for each in found}
        assert inodes == {os.fstat(connecting.fileno()).st_ino, os.fstat(accepted.fileno()).st_ino}


def test_a_cut_ends_the_targets_and_leaves_the_others(listener: socket.socket) -> None:
    first, second = connect(listener), connect(listener)
    inode = os.fstat(first[0].fileno()).st_ino
    assert sockets.cut(sockets.find(lambda each: each.inode == inode)) == 1
    assert first[0].recv(1) == b""
    assert first[1].recv(1) == b""
    second[0].send(b"x")
    assert second[1].recv(1) == b"x"
    third = connect(listener)
    for sock in (*first, *second, *third):
        sock.close()


def test_an_inode_that_belongs_to_another_socket_now_is_left_alone(listener: socket.socket) -> None:
    connecting, accepted = connect(listener)
    with connecting, accepted:
        inode = os.fstat(connecting.fileno()).st_ino
        stale = TcpSocket(inode, ("127.0.0.1", 1), ("127.0.0.1", 2))
        assert sockets.cut([stale]) == 0
        connecting.send(b"x")
        assert accepted.recv(1) == b"x"


def test_a_listener_is_never_cut(listener: socket.socket) -> None:
    inode = os.fstat(listener.fileno()).st_ino
    assert sockets.cut([TcpSocket(inode, end_of(listener), ("0.0.0.0", 0))]) == 0
    for sock in connect(listener):
        sock.close()


def test_a_socket_that_is_still_connecting_is_found_and_cut() -> None:
    """A full queue of connections: the kernel drops the next one's SYN, as a host that has vanished does."""
    with socket.socket() as full, socket.socket() as connecting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = []
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
            waiting.append(sock)
        connecting.setblocking(False)
        connecting.connect_ex(full.getsockname())
        inode = os.fstat(connecting.fileno()).st_ino
        found = sockets.find(lambda each: each.inode == inode)
        assert [each.peer for each in found] == [end_of(full)]
        assert connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert sockets.cut(found) == 1
        assert connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
        for sock in waiting:
            sock.close()


def test_mapped_and_scoped_addresses_have_one_spelling() -> None:
    assert endpoint("::ffff:10.0.0.7", 1) == ("10.0.0.7", 1)
    assert endpoint("fe80::1%eth0", 2) == ("fe80::1", 2)
    assert endpoint("0:0::1", 3) == ("::1", 3)


def test_only_addresses_of_ip_are_parsed() -> None:
    with pytest.raises(ValueError, match="family"):
        sockets.parse_address(b"\x01\x00" + bytes(100))
