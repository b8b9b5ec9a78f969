"""Tokens that the Kubernetes operator makes without asking the controller."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from stretto_controller.auth.access import Access, Principal, Role
from stretto_controller.auth.tokens import Tokens, Unauthenticated, issuer_line, line_of, new_issuer_key, new_token
from stretto_controller.cli import register
from stretto_operator.belongings import secret_manifest
from stretto_operator.job import read_job
from stretto_operator.settings import read_issuer_key
from stretto_operator.surroundings import Surroundings, job_token

_KEY = new_issuer_key()


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    file = tmp_path / "tokens"
    file.write_text(f"{line_of(Principal(Role.ADMIN), new_token())}\n{issuer_line(_KEY)}\n")
    return Tokens(file, 5.0)


def _caller(tokens: Tokens, token: str) -> Principal:
    return tokens.caller(Access.CHANGE_JOB, f"Bearer {token}")


def test_an_issued_token_is_its_jobs_and_no_others(tokens: Tokens) -> None:
    token = job_token(bytes.fromhex(_KEY), "digits-0a1b2c3d4e", "6b9a7e0e-6c1f-4f0e-9d7e-2f1d3c4b5a69")
    assert _caller(tokens, token) == Principal(Role.JOB, "digits-0a1b2c3d4e")


@pytest.mark.parametrize(
    "change",
    [
        lambda name, nonce, signature: f"other.{nonce}.{signature}",
        lambda name, nonce, signature: f"{name}.other.{signature}",
        lambda name, nonce, signature: f"{name}.{nonce}.{'A' * 43}",
        lambda name, nonce, signature: f"{name}.{nonce}",
        lambda name, nonce, signature: f"{name}.{nonce}.{signature}.{signature}",
    ],
)
def test_a_token_that_was_changed_is_nobodys(tokens: Tokens, change: object) -> None:
    assert callable(change)
    parts = job_token(bytes.fromhex(_KEY), "digits", "nonce").split(".")
    with pytest.raises(Unauthenticated):
        _caller(tokens, change(*parts))


def test_another_issuers_token_is_nobodys(tokens: Tokens) -> None:
    with pytest.raises(Unauthenticated):
        _caller(tokens, job_token(bytes(32), "digits", "nonce"))


def test_the_operators_secret_holds_a_token_that_the_controller_knows(tokens: Tokens, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(_KEY + "\n")
    job = read_job(
        {
            "apiVersion": "stretto.dev/v1alpha1",
            "kind": "ElasticTrainingJob",
            "metadata": {"name": "digits", "uid": "u-1"},
            "spec": {"template": {"spec": {"containers": [{"name": "trainer"}]}}},
        }
    )
    secret = secret_manifest(job, Surroundings("c:29400", issuer_key=read_issuer_key(file)))
    assert secret is not None
    token = base64.b64decode(secret["data"]["token"]).decode()
    assert _caller(tokens, token).job == job.controller_job


@pytest.mark.parametrize("content", ["", "zz", "00" * 31])
def test_a_key_that_is_none_is_refused_without_being_shown(tmp_path: Path, content: str) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    with pytest.raises(ValueError, match="key") as raised:
        read_issuer_key(file)
    assert not content or content not in str(raised.value)


def test_the_command_makes_a_key_and_its_line() -> None:
    import typer
    from stretto_controller.auth import command
    from typer.testing import CliRunner

    app = typer.Typer()
    register(app)
    command.register(app)
    result = CliRunner().invoke(app, ["token", "issuer"])
    assert result.stderr.strip() == issuer_line(result.stdout.strip())
