"""Hostile messages, all from one seed: mutated valid ones, absurd values, broken bytes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from google.protobuf import descriptor as descriptors
from google.protobuf import message_factory
from stretto_proto.v1 import rendezvous_pb2 as rendezvous
from stretto_proto.v1 import training_pb2 as training
from stretto_proto.v1 import types_pb2 as types

_INTEGERS = (0, 1, 2, 3, -1, 64, 65, 4097, 65536, 2**31 - 1, -(2**31), 2**53, 2**63 - 1, -(2**63))
_FLOATS = (0.0, 1.0, -1.0, -0.0, math.nan, math.inf, -math.inf, 1e308, 5e-324, 2.0**53)
_TEXTS = (
    "", "n0", "n1", "w", "a" * 64, "a" * 300, "A", "-", "a.b", "../../etc/passwd", "a\x00b", "a\nb", "'; DROP TABLE",
    "{{7*7}}", "%s%n", "\u202e", "🜁" * 20, "é", "<script>", "127.0.0.1", "::1", "key-of-somebody-else", "a" * 5000,
)  # fmt: skip
_LARGE_REPEATED, _LARGE_BYTES, _OVERSIZE_BYTES = 5000, 900_000, 1_100_000


class Hostile:
    """A source of messages. jobs: names to speak of; the first is the one that the speaker may touch."""

    def __init__(self, seed: int, jobs: tuple[str, ...]) -> None:
        self.rng = random.Random(seed)
        self._jobs = jobs

    def request(self, kind: descriptors.Descriptor) -> bytes:
        """A request of a unary method."""
        message = self._filled(kind)
        if "job" in kind.fields_by_name:
            message.job = self._job()
        return self._spoilt(message.SerializeToString(), 0.4)

    def conversation(self, service: str) -> list[bytes]:
        """The messages of one stream: mostly a good hello first, then anything in any order."""
        agent = service == "Rendezvous"
        kind = (rendezvous.AttendRequest if agent else training.TrainRequest).DESCRIPTOR
        messages = [self._node_hello() if agent else self._worker_hello()]
        for _ in range(self.rng.randrange(6)):
            message = self._filled(kind)
            messages.append(self._spoilt(message.SerializeToString(), 0.2))
        if self.rng.random() < 0.2:
            self.rng.shuffle(messages)
        return messages

    def _job(self) -> str:
        return self._jobs[0] if self.rng.random() < 0.7 else self.rng.choice([*self._jobs, *_TEXTS])

    def _node_hello(self) -> bytes:
        rng = self.rng
        node = f"n{rng.randrange(4)}"
        hello = rendezvous.NodeHello(
            protocol_version=1,
            job=self._job(),
            node_id=node,
            node_key=f"the secret key of {node}",
            slots=1,
            address="::1",
        )
        modes = (types.RECONFIGURE_MODE_RESTART, types.RECONFIGURE_MODE_IN_PROCESS)
        hello.spec.CopyFrom(types.JobSpec(min_nodes=1, max_nodes=2, mode=modes[rng.random() < 0.7]))
        if rng.random() < 0.7:
            hello.ready.CopyFrom(rendezvous.NodeReady(request_id=rng.randrange(1, 9), restarts_left=-1))
        return self._spoilt(self._altered(rendezvous.AttendRequest(hello=hello)), 0.1)

    def _worker_hello(self) -> bytes:
        rng = self.rng
        hello = training.WorkerHello(protocol_version=1, job=self._job(), node_id=f"n{rng.randrange(4)}", rank=-1)
        if rng.random() < 0.5:
            hello.ready.CopyFrom(training.WorkerReady(request_id=rng.randrange(1, 9), store_port=1, preflight_port=2))
        else:
            hello.rank, hello.generation = rng.randrange(2), rng.randrange(1, 12)
        return self._spoilt(self._altered(training.TrainRequest(hello=hello)), 0.1)

    def _altered(self, message: Any) -> bytes:
        """One field of the hello, somewhere, is something else."""
        if self.rng.random() < 0.4:
            part = message.hello
            field = self.rng.choice(part.DESCRIPTOR.fields)
            part.ClearField(field.name)
            self._fill(part, field, depth=1)
        data: bytes = message.SerializeToString()
        return data

    def _filled(self, kind: descriptors.Descriptor, depth: int = 0) -> Any:
        message = message_factory.GetMessageClass(kind)()
        oneofs = [self.rng.choice(oneof.fields).name for oneof in kind.oneofs]
        for field in kind.fields:
            chosen = field.name in oneofs if field.containing_oneof else self.rng.random() < 0.6
            if chosen:
                self._fill(message, field, depth)
        return message

    def _fill(self, message: Any, field: descriptors.FieldDescriptor, depth: int) -> None:
        if field.type == field.TYPE_MESSAGE:
            if depth < 4 and not field.is_repeated and field.message_type is not None:
                getattr(message, field.name).CopyFrom(self._filled(field.message_type, depth + 1))
            return
        if field.is_repeated:
            count = _LARGE_REPEATED if self.rng.random() < 0.02 else self.rng.randrange(4)
            getattr(message, field.name).extend(self._value(field) for _ in range(count))
        else:
            setattr(message, field.name, self._value(field))

    def _value(self, field: descriptors.FieldDescriptor) -> Any:
        rng = self.rng
        if field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
            return rng.choice(_FLOATS)
        if field.cpp_type == field.CPPTYPE_BOOL:
            return rng.random() < 0.5
        if field.cpp_type == field.CPPTYPE_STRING:
            return self._job() if field.name == "job" else rng.choice(_TEXTS)
        wide = field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64)
        return rng.choice(_INTEGERS if wide else [value for value in _INTEGERS if -(2**31) <= value < 2**31])

    def _spoilt(self, data: bytes, share: float) -> bytes:
        """So many of the messages are no longer what they were."""
        if self.rng.random() >= share:
            return data
        ways: list[Callable[[bytes], bytes]] = [
            self._flipped, self._cut, self._doubled, self._noise, self._bad_text, self._endless, self._nested,
        ]  # fmt: skip
        if self.rng.random() < 0.02:
            ways = [
                lambda data: data + _text_field(15, b"a" * _LARGE_BYTES),
                lambda data: data + bytes(_OVERSIZE_BYTES),
            ]
        return self.rng.choice(ways)(data)

    def _flipped(self, data: bytes) -> bytes:
        flipped = bytearray(data or b"\x00")
        for _ in range(self.rng.randrange(1, 5)):
            flipped[self.rng.randrange(len(flipped))] ^= 1 << self.rng.randrange(8)
        return bytes(flipped)

    def _cut(self, data: bytes) -> bytes:
        return data[: self.rng.randrange(len(data) + 1)]

    def _doubled(self, data: bytes) -> bytes:
        return data + data

    def _noise(self, data: bytes) -> bytes:
        return self.rng.randbytes(self.rng.randrange(200))

    def _bad_text(self, data: bytes) -> bytes:
        """A string field that is no UTF-8."""
        return data + _text_field(self.rng.randrange(1, 5), b"\xff\xfe\xc0")

    def _endless(self, data: bytes) -> bytes:
        """A length that goes far beyond the end."""
        return data + b"\x0a\xff\xff\xff\xff\x0f"

    def _nested(self, data: bytes) -> bytes:
        """Groups within groups, deeper than any parser should follow."""
        return data + b"\x0b" * self.rng.choice((50, 5000))


def _text_field(number: int, value: bytes) -> bytes:
    size, length = len(value), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value
