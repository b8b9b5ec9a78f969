"""State as JSON and tensors: without loss, and what cannot be said is named."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from saving.likeness import same
from stretto.plain_tree import TreeEncoder, decode

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5))
keys = st.one_of(st.text(max_size=4), st.integers(), st.booleans(), st.sampled_from(["$tensor", "$dict", "$"]))
tensors = st.sampled_from(
    [
        torch.arange(6.0).reshape(2, 3),
        torch.tensor(5),
        torch.empty(0, 3),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.tensor([math.nan, -0.0]),
    ]
)
trees = st.recursive(
    st.one_of(scalars, tensors),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=12,
)


@given(trees)
def test_any_nested_value_comes_back_as_it_was(tree: Any) -> None:
    encoder = TreeEncoder()
    assert same(decode(encoder.encode(tree, "tree"), encoder.tensors), tree)
