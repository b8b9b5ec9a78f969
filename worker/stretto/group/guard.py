"""Watches over init_process_group from a thread of its own, and frees it when the build is given up.

The thread inside cannot look for news. The guard does, and when there is news it ends whatever gloo waits for there:
it cuts the sockets of this build again and again, and stands in for every peer that gloo still expects to connect
("rescue": a pair that listens has no socket to cut). Init then returns or raises; what it made is of no use.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from stretto.group import sockets, torch_private
from stretto.group.failures import BuildFailed, Superseded
from stretto.group.plan import GroupSettings, Plan
from stretto.group.sockets import Endpoint, TcpSocket
from stretto.group.store import FormationStore
from stretto.group.watchdog import Watchdog

Verdict = Superseded | BuildFailed


class Guard:
    """Guards one init. `verdict` says why it was ended, if it was."""

    def __init__(
        self, plan: Plan, settings: GroupSettings, watchdog: Watchdog, *, judge: Callable[[], Verdict | None]
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._watchdog = watchdog
        self._judge = judge
        self._finished = threading.Event()
        self._rescued: dict[Endpoint, list[socket.socket]] = {}
        self.verdict: Verdict | None = None

    @contextlib.contextmanager
    def over(self, store: FormationStore) -> Iterator[None]:
        """Guard what happens inside; `store` tells where gloo listens."""
        thread = threading.Thread(target=self._run, args=(store,), name="stretto-guard", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._finished.set()
            thread.join()

    def check(self) -> None:
        """Raise the verdict, if there is one."""
        if self.verdict is not None:
            raise self.verdict

    def sockets(self, store: FormationStore) -> list[TcpSocket]:
        """This build's sockets: accepted by our gloo, or connected to a peer's."""
        own = {listener.end for listener in store.own_listeners()}
        peers = {listener.end for listener in store.peer_listeners()}
        return sockets.find(lambda found: found.local in own or found.peer in peers)

    def _run(self, store: FormationStore) -> None:
        while not self._finished.wait(self._settings.poll_interval_s):
            self.verdict = self._judge()
            if self.verdict is not None:
                with self._watchdog.watch("a build that was given up"):
                    self._free(store)
                return

    def _free(self, store: FormationStore) -> None:
        while True:
            self._rescue(store)
            sockets.cut(self.sockets(store))
            if self._finished.wait(self._settings.cut_interval_s):
                break
        for stand_ins in self._rescued.values():
            for sock in stand_ins:
                sock.close()

    def _rescue(self, store: FormationStore) -> None:
        """Stand in for every peer, once for each listener that has been published by now."""
        for listener in store.own_listeners():
            if listener.end in self._rescued:
                continue
            stand_ins = self._rescued[listener.end] = []
            for peer in self._plan.peers:
                with contextlib.suppress(OSError):  # init has left meanwhile, and its listener is gone
                    stand_ins.append(torch_private.introduce(listener, peer))
