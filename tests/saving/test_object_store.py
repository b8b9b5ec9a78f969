"""Checkpoints in an S3 API server on loopback: multipart uploads, credentials of the environment, conditional puts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from saving.likeness import same
from saving.training import train, training_state
from stretto.checkpoint import Checkpointer, CheckpointFailed, CheckpointSettings, Conflict, Fenced

BUCKET = "models"
URL = f"s3://{BUCKET}/team/digits"


class Bucket:
    """The server's side: what is stored there."""

    def __init__(self, endpoint: str) -> None:
        self._client = boto3.client("s3", endpoint_url=endpoint)
        self._client.create_bucket(Bucket=BUCKET)

    def objects(self) -> list[str]:
        return sorted(entry["Key"] for entry in self._client.list_objects_v2(Bucket=BUCKET).get("Contents", []))

    def read(self, key: str) -> bytes:
        data: bytes = self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return data

    def write(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=key)

    def parts_of(self, key: str) -> int:
        """How many parts it was uploaded in; 0 for a plain put."""
        tag = self._client.head_object(Bucket=BUCKET, Key=key)["ETag"].strip('"')
        return int(tag.rpartition("-")[2]) if "-" in tag else 0


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "who")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = Bucket(endpoint)
    yield bucket
    for key in bucket.objects():
        bucket.delete(key)
    s3fs.S3FileSystem.clear_instance_cache()


def _large() -> dict[str, Any]:
    """More than one part of an upload."""
    return {"x": torch.arange(4_000_000, dtype=torch.int32), "words": "large"}


def test_a_state_goes_there_and_back(bucket: Bucket) -> None:
    state = {**training_state(), **_large()}
    train(state, 1)
    checkpointer = Checkpointer(URL, keep=2, settings=CheckpointSettings(part_bytes=20 << 20))
    for step in (1, 2, 3):
        checkpointer.save(state, step=step, generation=1, fences=True)
    keys = bucket.objects()
    assert sum(key.endswith("manifest.json") for key in keys) == 2, "the oldest is gone"
    assert max(bucket.parts_of(key) for key in keys) >= 2, "a large file is uploaded in parts"
    loaded = {**training_state(1), "x": None, "words": None}
    info = Checkpointer(URL).load_latest(loaded)
    assert info is not None
    assert (info.step, info.path) == (3, f"models/team/digits/{info.path.rsplit('/', 1)[-1]}")
    assert same(loaded["x"], state["x"])
    assert same(loaded["optimizer"].state_dict(), state["optimizer"].state_dict())


def test_damage_there_is_noticed_and_the_one_before_used(bucket: Bucket) -> None:
    checkpointer = Checkpointer(URL)
    for step in (1, 2):
        checkpointer.save({"x": torch.full((50,), float(step))}, step=step)
    newest = [key for key in bucket.objects() if "step-000000000002" in key]
    for key in newest:
        whole = bucket.read(key)
        for spoiled in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], None):
            if spoiled is None:
                bucket.delete(key)
            else:
                bucket.write(key, spoiled)
            state: dict[str, Any] = {"x": None}
            info = Checkpointer(URL).load_latest(state)
            assert info is not None
            assert (info.step, float(state["x"][0])) == (1, 1.0), key
        bucket.write(key, whole)
    assert Checkpointer(URL).verify(newest[0].rsplit("/", 1)[0])


def test_an_upload_that_was_not_ended_does_not_count(bucket: Bucket) -> None:
    checkpointer = Checkpointer(URL)
    checkpointer.save({"x": 1}, step=1)
    checkpointer.save({"x": 2}, step=2)
    (manifest,) = [key for key in bucket.objects() if "step-000000000002" in key and "manifest" in key]
    bucket.delete(manifest)
    state = {"x": 0}
    info = Checkpointer(URL).load_latest(state)
    assert info is not None
    assert state == {"x": 1}
    assert "the save did not end" in info.passed_over[0].reason


def test_fences_and_claims_are_conditional_puts(bucket: Bucket) -> None:
    old, new = Checkpointer(URL, job="digits"), Checkpointer(URL, job="digits")
    old.save({"x": 1}, step=1, generation=3)
    new.fence(4)
    with pytest.raises(Fenced):
        old.save({"x": 2}, step=2, generation=3)
    with pytest.raises(Conflict, match="job digits"):
        Checkpointer(URL, job="letters").save({"x": 2}, step=2, generation=9)
    assert not new._store.create("job.json", b"{}"), "the server refuses to overwrite"


def test_a_bucket_that_is_not_there_is_an_error_in_words(bucket: Bucket) -> None:
    with pytest.raises(CheckpointFailed, match="no checkpoint of step 1"):
        Checkpointer("s3://no-such-bucket/x").save({"x": 1}, step=1)


def test_credentials_that_are_missing_are_said_to_be(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    Checkpointer(URL).save({"x": 1}, step=1)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CheckpointFailed, match=r"no checkpoint of step 2: .*Unable to locate credentials"):
        Checkpointer(URL).save({"x": 2}, step=2)
    with pytest.raises(CheckpointFailed, match="Unable to locate credentials"):
        Checkpointer(URL).load_latest({"x": None})
    with pytest.raises(CheckpointFailed, match="Unable to locate credentials"):
        Checkpointer(URL).fence(3)
    assert len([key for key in bucket.objects() if key.endswith("manifest.json")]) == 1


def test_exports_from_there(bucket: Bucket, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from stretto.checkpoint.export import export
    from stretto.checkpoint.store import Store

    checkpointer = Checkpointer(URL)
    state = training_state()
    checkpointer.save(state, step=1)
    (name,) = checkpointer._catalogue.newest_first()
    assert export(Store(URL), name, tmp_path / "model.safetensors") == len(state["model"].state_dict())
    assert same(load_file(tmp_path / "model.safetensors")["0.bias"], state["model"].state_dict()["0.bias"])
