"""Settings: which source wins, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from stretto_controller.settings import Settings, is_loopback, read_settings


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "stretto.toml"
    file.write_text("grpc_port = 1\nhttp_port = 2\nstore = 'sqlite'\n[limits]\nsettle_s = 3\n[service]\nmax_jobs = 4\n")
    environment = {
        "STRETTO_GRPC_PORT": "11",
        "STRETTO_HTTP_PORT": "12",
        "STRETTO_LIMITS_SETTLE_S": "0.5",
        "STRETTO_ENDPOINT": "not ours",
    }
    settings = read_settings({"grpc_port": 111, "http_port": None}, environment, file)
    assert (settings.grpc_port, settings.http_port, settings.host) == (111, 12, "127.0.0.1")
    assert settings.limits.settle_s == 0.5
    assert settings.service.max_jobs == 4
    assert read_settings({}, {}, file).limits.settle_s == 3.0
    assert read_settings({}, {}) == Settings()


def test_each_kind_of_value_is_read_from_the_environment() -> None:
    settings = read_settings({}, {"STRETTO_DATA_DIR": "/d", "STRETTO_INSECURE": "true", "STRETTO_READY_FILE": "/r"})
    assert (settings.data_dir, settings.insecure, settings.ready_file) == (Path("/d"), True, Path("/r"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"STRETTO_GRPC_PORT": "x"}, "STRETTO_GRPC_PORT is 'x'; it must be a whole number"),
        ({"STRETTO_GRPC_PORT": "65536"}, "grpc_port is 65536; it must be between 0"),
        ({"STRETTO_GRPC_PORT": "8080"}, "both 8080; give two different ports"),
        ({"STRETTO_LIMITS_SETTLE_S": "soon"}, "STRETTO_LIMITS_SETTLE_S is 'soon'; it must be a number"),
        ({"STRETTO_LIMITS_SETTLE_S": "0"}, "settle_s is 0.0; it must be above 0"),
        ({"STRETTO_SERVICE_MAX_JOBS": "-1"}, "max_jobs is -1; it must be finite and above 0"),
        ({"STRETTO_SERVICE_TICK_INTERVAL_S": "nan"}, "tick_interval_s is nan"),
        ({"STRETTO_INSECURE": "perhaps"}, "STRETTO_INSECURE is 'perhaps'; it must be true or false"),
        ({"STRETTO_LOG_FORMAT": "xml"}, "log_format is 'xml'; it must be one of console, json"),
        ({"STRETTO_STORE": "redis"}, "store is 'redis'; it must be one of sqlite, etcd"),
        ({"STRETTO_ETCD_ENDPOINTS": "etcd.example"}, "etcd.endpoints is 'etcd.example'; give HOST:PORT"),
        ({"STRETTO_ETCD_PREFIX": "stretto"}, "it must begin and end with /"),
        ({"STRETTO_ETCD_USER": "root"}, "etcd.user and etcd.password_file belong together"),
        ({"STRETTO_ETCD_KEY": "x"}, "etcd.cert and etcd.key belong together"),
        ({"STRETTO_ETCD_LEASE_S": "1"}, "etcd.lease_s is 1; it must be between 2 and 60"),
        ({"STRETTO_HOST": "0.0.0.0"}, "give --tls-cert, --tls-key and --tokens"),
        ({"STRETTO_HOST": "0.0.0.0", "STRETTO_SECURITY_TOKENS": "x"}, "give --tls-cert, --tls-key and --tokens"),
        ({"STRETTO_SECURITY_TLS_KEY": "x"}, "tls_cert and tls_key belong together"),
        ({"STRETTO_SECURITY_TLS_CLIENT_CA": "x"}, "tls_client_ca needs tls_cert and tls_key"),
    ],
)
def test_a_bad_value_says_what_was_given_and_what_is_allowed(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings({}, environment)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grpc_prot = 1", "unknown settings grpc_prot; known here: advertise, data_dir"),
        ("[limits]\nsettle = 1", "unknown settings settle; known here: "),
        ("limits = 1", "limits in .* is 1; it must be a table"),
        ("grpc_port = ", "cannot read the settings file"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "stretto.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings({}, {}, file)


def test_other_machines_are_served_only_when_that_is_said_aloud() -> None:
    assert read_settings({"host": "0.0.0.0", "insecure": True}, {}).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("::", False)],
)
def test_what_counts_as_this_machine(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
