"""TLS and tokens from end to end: real servers, the library's own clients, and the doctor's word on each fault."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from harness.bench import SPEC, Bench
from harness.certificates import Authority, Issued
from stretto.client import JobsClient
from stretto.commands import doctor
from stretto.commands.doctor import examine
from stretto.credentials import VARIABLES
from stretto.errors import Fatal, Retry
from stretto_controller.auth.access import Principal, Role
from stretto_controller.auth.certificates import Certificates
from stretto_controller.auth.tokens import Tokens, line_of, new_token
from stretto_controller.core.events import JobCreated
from stretto_controller.service.server import GrpcServer
from stretto_controller.settings import ServiceLimits, Settings
from stretto_controller.web.app import build_app
from stretto_controller.web.server import HttpServer


class Secured:
    """A controller in this process with TLS and tokens on both ports."""

    def __init__(self, directory: Path, issued: Issued, client_ca: Path | None = None) -> None:
        self.cert, self.key = directory / "server.pem", directory / "server.key"
        self.install(issued)
        self.token = new_token()
        file = directory / "tokens"
        file.write_text(line_of(Principal(Role.ADMIN), self.token))
        self.bench = Bench()
        settings = Settings(grpc_port=0, http_port=0)
        certificates = Certificates(self.cert, self.key, client_ca)
        tokens = Tokens(file, 0.0)
        self._grpc = GrpcServer(self.bench.runner, settings, tokens, certificates)
        self._http = HttpServer(build_app(self.bench.runner, ServiceLimits(), tokens), settings, certificates)

    def install(self, issued: Issued) -> None:
        shutil.copy(issued.cert, self.cert)
        shutil.copy(issued.key, self.key)

    async def __aenter__(self) -> Secured:
        self.bench.runner.submit("a", JobCreated(SPEC))
        await self.bench.store.finish()
        self.endpoint = f"127.0.0.1:{await self._grpc.start()}"
        self.http_port = await self._http.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.bench.runner.stop()
        await self._grpc.stop()
        await self._http.stop()

    async def serial(self, port: int, ca: Path) -> str:
        """Of the certificate that a new connection to a port gets. Raises SSLError if `ca` does not vouch for it."""
        context = ssl.create_default_context(cafile=str(ca))
        context.set_alpn_protocols(["h2", "http/1.1"])
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        serial: str = writer.get_extra_info("peercert")["serialNumber"]
        writer.close()
        return serial


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
async def secured(tmp_path: Path, authority: Authority) -> AsyncIterator[Secured]:
    async with Secured(tmp_path, authority.issue("IP:127.0.0.1")) as secured:
        yield secured


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


async def names(endpoint: str) -> list[str]:
    """The jobs that a client with the environment's credentials sees."""

    def ask() -> list[str]:
        with JobsClient(endpoint, timeout_s=30.0) as client:
            return [job.name for job in client.list()]

    return await asyncio.to_thread(ask)


async def wrongs(endpoint: str, environment: Mapping[str, str]) -> str:
    """What the doctor finds wrong."""
    findings = await asyncio.to_thread(lambda: list(examine(endpoint, environment)))
    return "\n".join(f"{finding.text} -> {finding.remedy}" for finding in findings if not finding.ok)


async def test_a_client_with_the_authority_and_a_token_is_served(
    secured: Secured, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRETTO_TLS_CA", str(authority.ca))
    with pytest.raises(Fatal, match="a token is needed: set STRETTO_TOKEN"):
        await names(secured.endpoint)
    assert "set STRETTO_TOKEN" in await wrongs(secured.endpoint, {"STRETTO_TLS_CA": str(authority.ca)})
    monkeypatch.setenv("STRETTO_TOKEN", "not-this-one")
    with pytest.raises(Fatal, match="the token is not known here") as refused:
        await names(secured.endpoint)
    assert "not-this-one" not in str(refused.value)
    environment = {"STRETTO_TLS_CA": str(authority.ca), "STRETTO_TOKEN": "not-this-one"}
    assert "mend STRETTO_TOKEN" in await wrongs(secured.endpoint, environment)
    monkeypatch.setenv("STRETTO_TOKEN", secured.token)
    assert await names(secured.endpoint) == ["a"]
    environment["STRETTO_TOKEN"] = secured.token
    assert "run NTP on both machines" in await wrongs(secured.endpoint, environment)
    secured.bench.wall_s = time.time()
    assert not await wrongs(secured.endpoint, environment)


async def test_a_client_without_tls_or_with_another_authority_is_not_served(
    secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Retry):
        await names(secured.endpoint)
    assert "speaks TLS -> set STRETTO_TLS_CA" in await wrongs(secured.endpoint, {})
    stranger = Authority(tmp_path / "stranger")
    monkeypatch.setenv("STRETTO_TLS_CA", str(stranger.ca))
    with pytest.raises(Retry):
        await names(secured.endpoint)
    found = await wrongs(secured.endpoint, {"STRETTO_TLS_CA": str(stranger.ca)})
    assert "does not vouch for" in found


async def test_the_doctor_names_a_certificate_for_another_name(tmp_path: Path, authority: Authority) -> None:
    async with Secured(tmp_path, authority.issue("DNS:controller.example.org")) as secured:
        found = await wrongs(secured.endpoint, {"STRETTO_TLS_CA": str(authority.ca)})
        assert "has a certificate for another name" in found
        assert "subjectAltName" in found


async def test_the_doctor_names_a_certificate_that_ends_soon(tmp_path: Path, authority: Authority) -> None:
    async with Secured(tmp_path, authority.issue("IP:127.0.0.1", days=3)) as secured:
        assert "renew it" in await wrongs(secured.endpoint, {"STRETTO_TLS_CA": str(authority.ca)})


async def test_the_doctor_names_a_certificate_that_has_ended(tmp_path: Path, authority: Authority) -> None:
    async with Secured(tmp_path, authority.issue("IP:127.0.0.1", days=0)) as secured:
        found = await wrongs(secured.endpoint, {"STRETTO_TLS_CA": str(authority.ca)})
        assert "out of its time by this machine's clock: certificate has expired -> renew it" in found


async def test_the_doctor_names_a_client_certificate_that_is_missing(tmp_path: Path, authority: Authority) -> None:
    async with Secured(tmp_path, authority.issue("IP:127.0.0.1"), authority.ca) as secured:
        environment = {"STRETTO_TLS_CA": str(authority.ca)}
        found = await wrongs(secured.endpoint, environment)
        assert "only clients with a certificate in, and this one has none -> set STRETTO_TLS_CERT" in found
        stranger = Authority(tmp_path / "stranger").issue("DNS:agent.example.org")
        environment |= {"STRETTO_TLS_CERT": str(stranger.cert), "STRETTO_TLS_KEY": str(stranger.key)}
        assert "and refuses this one's" in await wrongs(secured.endpoint, environment)


async def test_the_doctor_names_files_that_are_missing_or_no_certificates(secured: Secured, tmp_path: Path) -> None:
    assert "cannot read /no/such.pem" in await wrongs(secured.endpoint, {"STRETTO_TLS_CA": "/no/such.pem"})
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    assert "cannot be used" in await wrongs(secured.endpoint, {"STRETTO_TLS_CA": str(text)})


async def test_the_doctor_names_the_page_s_port_and_tls_where_there_is_none(
    tmp_path: Path, authority: Authority
) -> None:
    bench, settings, tokens = Bench(), Settings(grpc_port=0, http_port=0), Tokens(None, 0.0)
    http = HttpServer(build_app(bench.runner, ServiceLimits(), tokens), settings, None)
    port = await http.start()
    try:
        assert "is an HTTP server" in await wrongs(f"127.0.0.1:{port}", {})
        found = await wrongs(f"127.0.0.1:{port}", {"STRETTO_TLS_CA": str(authority.ca)})
        assert "does not speak TLS" in found
        assert "-> unset STRETTO_TLS_CA" in found
    finally:
        await bench.runner.stop()
        await http.stop()


def test_the_doctor_names_packages_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda package: "1.13.1+cu117" if package == "torch" else "99.0")
    found = next(finding for finding in doctor.examine("127.0.0.1:1", {}) if not finding.ok)
    assert "torch 1.13.1+cu117 is older than 2.10" in found.text


async def test_the_doctor_names_a_closed_port_a_bad_name_and_a_bad_endpoint() -> None:
    assert "is `stretto controller` running there" in await wrongs("127.0.0.1:1", {})
    assert "is no name that this machine knows" in await wrongs("no-such-host.invalid:1", {})
    assert "is not HOST" in await wrongs("127.0.0.1:port", {})
    assert "STRETTO_TLS_CERT and STRETTO_TLS_KEY belong together" in await wrongs("x:1", {"STRETTO_TLS_KEY": "x"})


async def test_a_renewed_certificate_is_served_without_a_restart_and_a_broken_one_is_not(
    secured: Secured, authority: Authority
) -> None:
    grpc_port = int(secured.endpoint.rpartition(":")[2])
    old = await secured.serial(grpc_port, authority.ca)
    assert await secured.serial(secured.http_port, authority.ca) == old
    fresh = authority.issue("IP:127.0.0.1")
    # A certificate whose key has not come yet: the old pair goes on.
    shutil.copy(fresh.cert, secured.cert)
    for port in (grpc_port, secured.http_port):
        assert await secured.serial(port, authority.ca) == old
    secured.install(fresh)
    new = await secured.serial(grpc_port, authority.ca)
    assert new != old
    assert await secured.serial(secured.http_port, authority.ca) == new


async def test_with_a_client_authority_only_its_clients_are_let_in(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Secured(tmp_path, authority.issue("IP:127.0.0.1"), authority.ca) as secured:
        monkeypatch.setenv("STRETTO_TLS_CA", str(authority.ca))
        monkeypatch.setenv("STRETTO_TOKEN", secured.token)
        with pytest.raises(Retry):
            await names(secured.endpoint)
        issued = authority.issue("DNS:agent.example.org")
        monkeypatch.setenv("STRETTO_TLS_CERT", str(issued.cert))
        monkeypatch.setenv("STRETTO_TLS_KEY", str(issued.key))
        assert await names(secured.endpoint) == ["a"]


async def test_a_token_never_travels_in_the_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRETTO_TOKEN", "secret-word")
    with pytest.raises(Fatal, match="readable for everybody on the way") as refused:
        await names("controller.example.org:29400")
    assert "secret-word" not in str(refused.value)
