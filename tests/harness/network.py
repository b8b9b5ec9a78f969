"""Hosts of our own on this machine, each a network namespace behind one router; any two can be cut off from each other.

Packets between two that are cut off vanish without a word, as on a broken switch: the router has a rule for the pair
that leads nowhere. Needs root, Linux and iproute2. Nothing of it touches the machine's own network.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterable
from types import TracebackType

ROUTER = "router"


class Network:
    """Makes the hosts, and removes them. Addresses are the hosts' own business: nobody else can reach them."""

    def __init__(self, *hosts: str) -> None:
        self._first, self._hosts = hosts, list[str]()
        self._cuts: set[tuple[str, str]] = set()

    @staticmethod
    def objection() -> str | None:
        """Why there can be no such network on this machine; None if there can."""
        if shutil.which("ip") is None:
            return "the command ip is missing (on Debian: apt-get install iproute2)"
        name = f"stretto-try-{os.getpid()}"
        tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
        if tried.returncode != 0:
            return f"no network namespaces can be made here: {tried.stderr.strip()}"
        _ip("netns", "del", name)
        return None

    def __enter__(self) -> Network:
        _ip("netns", "add", self._namespace(ROUTER))
        forward = ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]
        subprocess.run([*self.command(ROUTER), *forward], check=True)
        for host in self._first:
            self.add(host)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in (*self._hosts, ROUTER):
            subprocess.run(["ip", "netns", "del", self._namespace(host)], capture_output=True, check=False)

    def add(self, host: str) -> None:
        """One more host, of at most 255."""
        self._hosts.append(host)
        number, inside, at_router = len(self._hosts), f"to-{ROUTER}", f"to-{host}"
        _ip("netns", "add", self._namespace(host))
        _ip(
            *("link", "add", inside, "netns", self._namespace(host), "type", "veth"),
            *("peer", "name", at_router, "netns", self._namespace(ROUTER)),
        )
        for name, interface, address in (
            (host, inside, self.address(host)),
            (ROUTER, at_router, f"10.77.{number}.1"),
        ):
            self._ip_in(name, "address", "add", f"{address}/24", "dev", interface)
            self._ip_in(name, "link", "set", interface, "up")
        self._ip_in(host, "link", "set", "lo", "up")
        self._ip_in(host, "route", "add", "default", "via", f"10.77.{number}.1")

    def address(self, host: str) -> str:
        return f"10.77.{self._hosts.index(host) + 1}.2"

    def command(self, host: str) -> list[str]:
        """What to put before a command line so that it runs on this host; the process is the same one."""
        return ["ip", "netns", "exec", self._namespace(host)]

    def cut(self, ones: Iterable[str], others: Iterable[str]) -> None:
        """No packet gets from any of the ones to any of the others, or back, from now on."""
        for pair in itertools.product(ones, others):
            for source, target in (pair, pair[::-1]):
                if (source, target) not in self._cuts:
                    self._cuts.add((source, target))
                    self._rule("add", source, target)

    def heal(self) -> None:
        """Packets pass everywhere."""
        while self._cuts:
            self._rule("del", *self._cuts.pop())

    def _rule(self, action: str, source: str, target: str) -> None:
        self._ip_in(ROUTER, "rule", action, "from", self.address(source), "to", self.address(target), "blackhole")

    def _namespace(self, host: str) -> str:
        return f"stretto-{os.getpid()}-{host}"

    def _ip_in(self, host: str, *arguments: str) -> None:
        _ip("-n", self._namespace(host), *arguments)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
