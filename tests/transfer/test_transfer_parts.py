"""The parts of a transfer on their own: checksum, layout, memory, manifest, fingerprint, loading."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stretto.transfer import TransferSettings, fingerprint, load
from stretto.transfer.checksum import Checksum, _on_accelerator
from stretto.transfer.layout import layout
from stretto.transfer.manifest import Manifest, TensorSpec
from stretto.transfer.memory import Parcels, flat_bytes
from torch import Tensor
from transfer.states import mixed_state, same_bits, state_of, training_objects


def checksum_of(*parts: Tensor | bytes) -> bytes:
    checksum = Checksum()
    for part in parts:
        if isinstance(part, bytes):
            checksum.add_text(part)
        else:
            checksum.add(part)
    return checksum.digest()


def random_bytes(size: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


# -- checksum


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 131_071, 131_072, 131_080, 1_048_576, 1_048_583, 2_500_001])
def test_any_flipped_bit_and_any_length_changes_the_checksum(size: int) -> None:
    data = random_bytes(size)
    seen = {checksum_of(data)}
    for place in {0, size // 3, size - 1} if size else set():
        for bit in (1, 128):
            changed = data.clone()
            changed[place] ^= bit
            seen.add(checksum_of(changed))
    seen.add(checksum_of(torch.cat([data, torch.zeros(1, dtype=torch.uint8)])))
    assert len(seen) == 2 + (2 * len({0, size // 3, size - 1}) if size else 0)


@given(st.sets(st.integers(0, 4095), min_size=1), st.integers(0, 2**32))
def test_flipped_signs_are_seen_wherever_and_however_many_they_are(places: set[int], seed: int) -> None:
    """The top bit of a word, for which a plain sum of products would only tell odd from even."""
    values = torch.randn(4096, generator=torch.Generator().manual_seed(seed))
    flipped = values.clone()
    flipped[list(places)] *= -1.0
    assert checksum_of(flat_bytes(values)) != checksum_of(flat_bytes(flipped))


@given(st.integers(0, 300_000), st.integers(0, 300_000))
def test_swapped_words_are_seen(one: int, other: int) -> None:
    words = torch.arange(300_001)
    swapped = words.clone()
    swapped[one], swapped[other] = other, one
    assert (checksum_of(flat_bytes(words)) == checksum_of(flat_bytes(swapped))) == (one == other)


def test_the_order_and_the_borders_of_parts_count() -> None:
    a, b = random_bytes(100, 1), random_bytes(100, 2)
    variants = [(a, b), (b, a), (torch.cat([a, b]),), (b"x", a, b), (a, b, b"x"), (a, b"x", b)]
    assert len({checksum_of(*variant) for variant in variants}) == len(variants)


@pytest.mark.parametrize("size", [8, 16_384 * 8, 131_072 * 8 + 40, 400_000 * 8])
def test_an_accelerator_computes_the_same_sums(size: int) -> None:
    data = random_bytes(size)
    assert _on_accelerator(data).equal(Checksum()._on_cpu(data))
    unaligned = random_bytes(size + 3)[3:]
    assert _on_accelerator(unaligned).equal(Checksum()._on_cpu(unaligned))


# -- layout


@given(
    st.lists(st.tuples(st.integers(0, 500), st.booleans()), max_size=20),
    st.integers(1, 20).map(lambda n: 8 * n),
    st.integers(0, 300),
)
def test_messages_cover_every_byte_once_in_order_and_stay_within_the_chunk(
    tensors: list[tuple[int, bool]], chunk_bytes: int, pack_below_bytes: int
) -> None:
    messages = layout(tensors, chunk_bytes=chunk_bytes, pack_below_bytes=pack_below_bytes)
    reached = [0] * len(tensors)
    for message in messages:
        assert 0 < message.size_bytes <= chunk_bytes
        assert len({tensors[piece.tensor][1] for piece in message.pieces}) == 1
        for piece in message.pieces:
            assert piece.start == reached[piece.tensor] < piece.stop
            reached[piece.tensor] = piece.stop
    assert reached == [size for size, _ in tensors]


def test_small_tensors_share_messages() -> None:
    assert len(layout([(1000, False)] * 1000, chunk_bytes=1 << 20)) == 1


# -- memory


@given(st.data())
def test_flat_bytes_and_a_received_tensor_agree_for_any_strides(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    tensor = torch.arange(math.prod(shape), dtype=torch.int16).reshape(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(tensor.dim()))))
    for dimension in range(tensor.dim()):
        tensor = tensor.narrow(dimension, 0, data.draw(st.integers(0, tensor.shape[dimension])))
    if data.draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    spec = TensorSpec.from_json(json.loads(json.dumps(TensorSpec.of(tensor).to_json())), "tensor 0")
    received = spec.empty(torch.device("cpu"))
    sent = flat_bytes(tensor)
    assert sent.numel() == spec.size_bytes
    flat_bytes(received).copy_(sent)
    assert received.equal(tensor)
    both = zip(received.stride(), torch.empty_like(tensor).stride(), tensor.shape, strict=True)
    assert tensor.numel() == 0 or all(ours == theirs for ours, theirs, size in both if size > 1)


def test_a_large_tensor_is_sent_from_its_own_memory() -> None:
    turned = torch.zeros(1000, 500).t()
    (message, *_) = layout([(2_000_000, False)], chunk_bytes=1 << 20)
    parcel = Parcels([turned], 1 << 20, torch.device("cpu")).wrap(message)
    assert parcel.wire.data_ptr() == turned.data_ptr()
    assert parcel.borrowed == []


def test_buffers_are_used_again() -> None:
    tensors = [torch.full((100,), n) for n in range(100)]
    parcels = Parcels(tensors, 8000, torch.device("cpu"))
    addresses = set()
    for message in layout([(800, False)] * 100, chunk_bytes=8000):
        parcel = parcels.wrap(message)
        parcels.fill(parcel)
        addresses.add(parcel.wire.data_ptr())
        parcels.release(parcel)
    assert len(addresses) == 1


# -- manifest


def manifest_json(**changes: Any) -> bytes:
    manifest, _ = Manifest.of({"a": torch.zeros(2, 3), "b": torch.zeros(4, 3).t()})
    return json.dumps(json.loads(manifest.to_bytes()) | changes).encode()


def test_a_state_comes_back_from_its_manifest_and_its_tensors() -> None:
    state = mixed_state(3)
    manifest, tensors = Manifest.of(state)
    read = Manifest.from_bytes(manifest.to_bytes(), state_bytes=manifest.state_bytes)
    assert read == manifest
    assert same_bits(read.state_with(tensors), state)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xff", "not JSON"),
        (DEEP.encode(), "not JSON"),
        (b"[1]", "format version None"),
        (manifest_json(format_version=99), "format version 99; this release reads 1"),
        (manifest_json(extra=1), "entries"),
        (manifest_json(tensors={}), "entries"),
        (manifest_json(tensors=[5]), "tensor 0 is 5 where"),
        (manifest_json(tensors=[["float33", [1], None, False]]), "dtype 'float33'"),
        (manifest_json(tensors=[["load", [1], None, False]]), "dtype 'load'"),
        (manifest_json(tensors=[["float32", [-1], None, False]]), r"shape is \[-1\]; allowed"),
        (manifest_json(tensors=[["float32", [True], None, False]]), r"shape is \[True\]; allowed"),
        (manifest_json(tensors=[["float32", [2.0], None, False]]), r"shape is \[2.0\]; allowed"),
        (manifest_json(tensors=[["float32", [1] * 65, None, False]]), "at most 64"),
        (manifest_json(tensors=[["float32", [1 << 40, 1 << 40], None, False]]), "too large"),
        (manifest_json(tensors=[["float32", [2, 3], [1, 1], False]]), "gaps or overlap"),
        (manifest_json(tensors=[["float32", [2, 3], [6, 2], False]]), "gaps or overlap"),
        (manifest_json(tensors=[["float32", [2, 3], [3], False]]), "gaps or overlap"),
        (manifest_json(tensors=[["float32", [0, 3], [3, 1], False]]), "gaps or overlap"),
        (manifest_json(tensors=[["float32", [1], None, 0]]), "true or false"),
        (manifest_json(tensors=[["float32", [7], None, False]]), "have 28 bytes; announced were 72"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_with_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Manifest.from_bytes(data, state_bytes=72)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"$tensor": "t2"}}, "KeyError: 't2'"),
        ({"a": {"$tensor": ["t0"]}}, "cannot be read"),
        ({"a": {"$dtype": "load"}}, "dtype 'load'"),
        ({"a": {"$new": 1}}, "a newer one wrote it"),
        ({"a": {"$dict": 7}}, "cannot be read"),
        ([1], "is a list where a dict"),
    ],
)
def test_a_tree_that_is_wrong_is_refused(tree: Any, message: str) -> None:
    manifest = Manifest.from_bytes(manifest_json(tree=tree), state_bytes=72)
    with pytest.raises(ValueError, match=message):
        manifest.state_with([torch.zeros(1), torch.zeros(1)])


def test_tensors_without_values_are_refused() -> None:
    with pytest.raises(ValueError, match="meta device"):
        Manifest.of({"a": torch.empty(3, device="meta")})


@pytest.mark.parametrize("settings", [{"chunk_bytes": 100}, {"chunk_bytes": 4100}, {"in_flight": 0}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        TransferSettings(**settings)


# -- fingerprint


def test_equal_states_have_equal_fingerprints_however_they_came_to_be() -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    one = {"a": tied, "b": tied, "c": {"x", "y"}, "d": OrderedDict(p=1, q=2)}
    other = {"d": OrderedDict(q=2, p=1), "c": {"y", "x"}, "b": tied.clone(), "a": tied.t().contiguous().t()}
    assert fingerprint(one) == fingerprint(other)
    assert 0 <= fingerprint(one) < 1 << 63


VALUE = torch.tensor([0.0, 1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.tensor([-0.0, 1.0, 2.0, 3.0]), "b": 1},
        {"a": VALUE.double(), "b": 1},
        {"a": VALUE.reshape(2, 2), "b": 1},
        {"a": VALUE.flip(0), "b": 1},
        {"a": VALUE, "b": 1.0},
        {"a": VALUE, "b": True},
        {"a": VALUE, "c": 1},
        {"a": VALUE},
        {"b": VALUE, "a": 1},
        {"a": VALUE.view(torch.int32), "b": 1},
    ],
)
def test_any_difference_changes_the_fingerprint(changed: dict[str, Any]) -> None:
    assert fingerprint(changed) != fingerprint({"a": VALUE, "b": 1})


def test_tensors_that_were_swapped_change_the_fingerprint() -> None:
    a, b = torch.rand(1_000_000), torch.rand(1_000_000)
    assert fingerprint({"a": a, "b": b}) != fingerprint({"a": b, "b": a})
    assert fingerprint({"a": a[:5], "b": b[:5]}) != fingerprint({"a": b[:5], "b": a[:5]})


# -- loading


@pytest.mark.parametrize(("steps", "momentum"), [(0, 0.9), (3, 0.9), (3, 0.0)])
def test_objects_take_a_state_in_place_whatever_they_held_before(steps: int, momentum: float) -> None:
    source, target = training_objects(1, 4), training_objects(2, steps, momentum=momentum)
    parameters = [*target["model"].parameters(), *target["model"].buffers()]
    moved = target["optimizer"].param_groups[0]["params"]
    manifest, tensors = Manifest.of(state_of(source))
    load(target, manifest.state_with([tensor.clone() for tensor in tensors]))
    assert fingerprint(state_of(target)) == fingerprint(state_of(source))
    now = [*target["model"].parameters(), *target["model"].buffers()]
    assert all(a is b for a, b in zip(parameters, now, strict=True))
    assert all(a is b for a, b in zip(moved, target["model"].parameters(), strict=True))
    assert target["model"][3].weight is target["model"][0].weight


def test_names_that_do_not_match_load_nothing() -> None:
    model = torch.nn.Linear(2, 2)
    before = fingerprint(model.state_dict())
    state = torch.nn.Linear(2, 2).state_dict()
    with pytest.raises(ValueError, match="the state has entries extra, model, but this worker has model"):
        load({"model": model}, {"model": state, "extra": {}})
    with pytest.raises(ValueError, match="number is a int, which has no load_state_dict"):
        load({"model": model, "number": 3}, {"model": state, "number": 4})
    assert fingerprint(model.state_dict()) == before
