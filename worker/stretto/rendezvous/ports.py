"""Addresses and ports that a node offers to its peers."""

from __future__ import annotations

import ipaddress
import logging
import socket

_log = logging.getLogger(__name__)


class ReservedPort:
    """A free port that stays ours until `close`, and that a torch TCPStore of this machine can bind meanwhile.

    The socket is bound, on all addresses, but does not listen: the kernel gives the port to nobody who asks for
    any free one, yet lets another socket with SO_REUSEADDR (torch sets it) bind the same number and listen.
    """

    def __init__(self) -> None:
        self._socket = _wildcard_socket()
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()


def _wildcard_socket() -> socket.socket:
    if socket.has_dualstack_ipv6():
        dual = socket.socket(socket.AF_INET6)
        try:
            dual.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            dual.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            dual.bind(("::", 0))
            return dual
        except OSError:
            # The kernel knows IPv6, but this machine or container has it switched off.
            dual.close()
    plain = socket.socket(socket.AF_INET)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    plain.bind(("", 0))
    return plain


def listening_socket(address: str) -> socket.socket:
    """A listening socket on a free port of `address`; of all addresses if `address` is not this machine's own."""
    family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    try:
        return _listen(family, where)
    except OSError:
        # An address that others translate to this machine (a service, a port forward) cannot be bound.
        _log.info("%s is not an address of this machine; listening on all of them", address)
        return _listen(family, ("", 0))


def _listen(family: int, where: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family)
    try:
        listener.bind(where)
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def address_towards(endpoint: str) -> str:
    """This machine's address on the way to `endpoint` (host:port); its full name if that cannot be found out."""
    host, _, port = endpoint.rpartition(":")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # Connecting a datagram socket sends nothing; it only chooses a route.
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError:
        return socket.getfqdn()


def numeric_address(address: str) -> str:
    """The IP address that `address` stands for: a number already, or a name, which this machine resolves.

    Peers could resolve a name differently. Debian gives a machine's own name a loopback address: another is preferred.
    Raises ValueError for a name that cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(address.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(
            f"this node's address {address} cannot be resolved ({error}); give an IP address with --local-addr"
        ) from error
    numbers = [str(where[0]) for *_, where in found]
    return next((number for number in numbers if not ipaddress.ip_address(number).is_loopback), numbers[0])
