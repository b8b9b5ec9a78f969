"""Who may use etcd: users, passwords, tokens that expire, and TLS, on a real one."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import grpc
import pytest
from harness.certificates import Authority
from harness.etcd import EtcdCluster
from harness.installed import installed
from store.terms import ME, RECORD, WAIT_S, Watched, begin, eventually
from stretto_controller.settings import EtcdSettings
from stretto_controller.store.contents import Save, StoreError
from stretto_controller.store.etcd.connection import RANGE, Connection, EtcdRefusedError, EtcdUnavailableError
from stretto_controller.store.etcd.store import EtcdStore
from stretto_proto.v1 import etcd_pb2 as etcd


async def test_a_token_that_expires_is_replaced(tmp_path: Path, terms: list[EtcdStore]) -> None:
    with EtcdCluster(tmp_path, options=["--auth-token-ttl", "1"]) as cluster:
        _secure(cluster)
        (tmp_path / "password").write_text("s3cret\n")
        settings = cluster.settings(user="root", password_file=tmp_path / "password", lease_s=60)
        store = await begin(settings, terms)
        for name in ("a", "b"):
            # What expiry looks like, without waiting for it: etcd does not know the token.
            store._connection._token = "expired.1"
            await store.save(Save(name, RECORD))
        watched = Watched(store._connection, "/stretto/jobs/a")
        await eventually(lambda: bool(watched.values))
        # etcd restarted: it has forgotten all tokens.
        cluster.kill(0)
        cluster.start(0)
        async with asyncio.timeout(WAIT_S):
            await store.save(Save("c", RECORD))
        await watched.end()
        await store.close()
        terms.clear()


async def test_a_wrong_password_is_said_clearly_and_without_the_password(tmp_path: Path) -> None:
    with EtcdCluster(tmp_path) as cluster:
        _secure(cluster)
        (tmp_path / "password").write_text("not-the-password")
        settings = cluster.settings(user="root", password_file=tmp_path / "password")
        store = EtcdStore(settings, kept_events=1, kept_generations=1)
        with pytest.raises(StoreError, match=r"authentication failed.*check etcd.user") as error:
            await store.lead(ME)
        assert "not-the-password" not in str(error.value)
        await store.close()


def _secure(cluster: EtcdCluster) -> None:
    """Turn authentication on: user root, password s3cret."""
    cluster.ask("auth/user/add", {"name": "root", "password": "s3cret"})
    cluster.ask("auth/role/add", {"name": "root"})
    cluster.ask("auth/user/grant", {"user": "root", "role": "root"})
    cluster.ask("auth/enable", {})


def _with_password(cluster: EtcdCluster, directory: Path, **changes: object) -> EtcdSettings:
    (directory / "password").write_text("s3cret\n")
    return cluster.settings(user="root", password_file=directory / "password", lease_s=60, **changes)


async def _until_refused(settings: EtcdSettings, token: str, pause_s: float) -> None:
    """Ask with this very token, pause_s apart, until etcd has forgotten it."""
    stranger = Connection(settings)
    async with asyncio.timeout(WAIT_S):
        while True:
            stranger._token = token
            try:
                await stranger._once(RANGE, etcd.EtcdRangeRequest(key=b"x"))
            except grpc.RpcError:
                break
            await asyncio.sleep(pause_s)
    await stranger.close()


async def test_a_simple_token_that_nobody_used_for_its_ttl_is_replaced(tmp_path: Path, terms: list[EtcdStore]) -> None:
    with EtcdCluster(tmp_path, options=["--auth-token", "simple", "--auth-token-ttl", "1"]) as cluster:
        _secure(cluster)
        settings = _with_password(cluster, tmp_path)
        store = await begin(settings, terms)
        watched = Watched(store._connection, "/stretto/jobs/a")
        await watched.sees(None)
        stale = store._connection._token
        # Longer than it lives unused; the lease is renewed seldom enough.
        await _until_refused(settings, stale, 2.5)
        await store.save(Save("a", RECORD))
        assert store._connection._token != stale
        await eventually(lambda: watched.values[-1] is not None)
        await watched.end()
        await store.close()
        terms.clear()


async def test_a_signed_token_that_has_expired_is_replaced(tmp_path: Path, terms: list[EtcdStore]) -> None:
    private, public = tmp_path / "jwt.key", tmp_path / "jwt.pub"
    for command in (
        ["genrsa", "-out", str(private), "2048"],
        ["rsa", "-in", str(private), "-pubout", "-out", str(public)],
    ):
        subprocess.run([installed("openssl"), *command], check=True, capture_output=True)
    signed = f"jwt,pub-key={public},priv-key={private},sign-method=RS256,ttl=2s"
    with EtcdCluster(tmp_path / "etcd", options=["--auth-token", signed]) as cluster:
        _secure(cluster)
        settings = _with_password(cluster, tmp_path)
        store = await begin(settings, terms)
        for name in ("a", "b"):
            stale = store._connection._token
            await _until_refused(settings, stale, 0.1)
            await store.save(Save(name, RECORD))
            assert store._connection._token != stale
        assert store.leads()
        await store.close()
        terms.clear()


async def test_tls_with_a_user_and_a_password(tmp_path: Path, terms: list[EtcdStore]) -> None:
    authority = Authority(tmp_path)
    with EtcdCluster(tmp_path / "etcd", 3, authority=authority) as cluster:
        # Afterwards only a user may ask.
        killed = await asyncio.to_thread(cluster.leader)
        _secure(cluster)
        client = authority.issue("DNS:controller")
        settings = _with_password(cluster, tmp_path, ca=authority.ca, cert=client.cert, key=client.key)
        store = await begin(settings, terms)
        await store.save(Save("a", RECORD))
        cluster.kill(killed)
        async with asyncio.timeout(WAIT_S):
            await store.save(Save("b", RECORD))
        await store.close()
        terms.clear()
        later = await begin(settings, terms)
        await later.save(Save("c", RECORD))


async def test_a_certificate_of_another_authority_is_not_spoken_to(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    with EtcdCluster(tmp_path / "etcd", authority=authority) as cluster:
        client = other.issue("DNS:controller")
        for ca, pair in ((other.ca, client), (authority.ca, client)):
            connection = Connection(cluster.settings(ca=ca, cert=pair.cert, key=pair.key))
            with pytest.raises((EtcdUnavailableError, EtcdRefusedError)):
                await connection.call(RANGE, etcd.EtcdRangeRequest(key=b"x"), limit_s=1.0)
            await connection.close()
