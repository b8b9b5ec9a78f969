"""One number for every bit of a state."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stretto.transfer.checksum import Checksum
from stretto.transfer.layout import layout
from stretto.transfer.manifest import LiveEncoder, TensorSpec
from stretto.transfer.memory import Parcels, flat_bytes

_CHUNK_BYTES = 8 << 20  # of the buffers that small tensors are gathered in


def fingerprint(state: Mapping[str, Any]) -> int:
    """Return 63 bits that are equal where all values are, bit by bit: types, shapes and dtypes too.

    The order of a dict's keys, tensors' strides and whether two entries are one object do not count. Nothing is
    copied but small tensors and those with gaps. The number means something within one release only.
    """
    encoder = _CanonicalEncoder()
    tree = encoder.encode(dict(state), "state")
    tensors = list(encoder.tensors.values())
    specs = [TensorSpec.of(tensor) for tensor in tensors]
    checksum = Checksum()
    table = [[str(spec.dtype), spec.shape, spec.on_accelerator] for spec in specs]
    checksum.add_text(json.dumps([table, tree], allow_nan=False).encode())
    parcels = Parcels(tensors, _CHUNK_BYTES, flatten=_logical_bytes)
    for message in layout([(spec.size_bytes, spec.on_accelerator) for spec in specs], chunk_bytes=_CHUNK_BYTES):
        parcel = parcels.wrap(message)
        parcels.fill(parcel)
        checksum.add(parcel.local)
        parcels.release(parcel)
    return int.from_bytes(checksum.digest()[:8], "little") >> 1


def _logical_bytes(tensor: Tensor) -> Tensor:
    return flat_bytes(tensor.contiguous())


class _CanonicalEncoder(LiveEncoder):
    """Gives equal states equal trees, however they came to be."""

    def encode(self, value: Any, where: str) -> Any:
        if type(value) in (set, frozenset):  # strings in a set come in another order in every process
            items = [self.encode(item, where) for item in sorted(value, key=repr)]
            return {f"${type(value).__name__}": items}
        return super().encode(value, where)

    def _encode_dict(self, value: dict[Any, Any], where: str) -> Any:
        if type(value) not in (dict, Counter, OrderedDict):
            return super()._encode_dict(value, where)
        in_order = type(value)(dict(sorted(value.items(), key=_key_text)))
        if isinstance(in_order, OrderedDict):
            vars(in_order).update(vars(value))  # the versions that modules keep there
        return super()._encode_dict(in_order, where)

    def _store(self, tensor: Tensor, where: str) -> str:
        self._seen.clear()
        return super()._store(tensor, where)


def _key_text(item: tuple[Any, Any]) -> str:
    return f"{type(item[0]).__name__} {item[0]!r}"
