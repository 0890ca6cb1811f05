from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cbsa_torch.train.data.fetch.pickled_array import read_pickled_array
from cbsa_torch.train.errors import DataError

INTEGERS = [
    np.dtype(order + kind) for order in "<>" for kind in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")
]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(INTEGERS).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=300).filter(
                lambda s: np.prod(s) < 5000
            ),
        )
    )
)
def test_arrays_of_integers_are_read_as_they_were(array):
    read = read_pickled_array(pickle.dumps(array, 4), "x")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_the_module_name_of_older_numpy_is_read():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    data = pickle.dumps(array, 4)
    old = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    np.testing.assert_array_equal(read_pickled_array(old, "x"), array)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_a_pickle_would_execute_is_not_executed(tmp_path):
    evil = Malicious(tmp_path / "made")
    for data in (pickle.dumps(evil, 4), pickle.dumps(np.array([evil, 1], dtype=object), 4)):
        with pytest.raises(DataError, match="not a pickled NumPy array of integers"):
            read_pickled_array(data, "labels.gz")
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(evil, 4))  # it would have
    assert (tmp_path / "made").exists()


def test_another_function_in_the_place_of_numpys_is_refused():
    data = pickle.dumps(np.arange(3), 4).replace(b"\x8c\x0c_reconstruct", b"\x8c\x0c_reconstruxt")
    with pytest.raises(DataError, match="_reconstruxt"):
        read_pickled_array(data, "x")


@pytest.mark.parametrize(
    "content",
    [
        *(3, [1, 2], "text", None, {"a": 1}),
        *(np.float32([1]), np.zeros(2), np.array(["a"]), np.array([True]), np.zeros((2, 2, 2, 2), int)),
        *(np.array(3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.zeros(2, [("a", int)])),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_other_content_is_refused(content):
    with pytest.raises(DataError, match="^x "):
        read_pickled_array(pickle.dumps(content, 4), "x")


@pytest.mark.parametrize("protocol", [0, 2, 3, 5])
def test_other_protocols_are_refused(protocol):
    with pytest.raises(DataError):
        read_pickled_array(pickle.dumps(np.arange(3), protocol), "x")


def test_every_truncated_pickle_is_refused():
    data = pickle.dumps(np.arange(4, dtype=np.uint8), 4)
    for end in range(len(data)):
        with pytest.raises(DataError):
            read_pickled_array(data[:end], "x")


def test_a_wrong_shape_and_trailing_bytes_are_refused():
    data = pickle.dumps(np.arange(4, dtype=np.uint8), 4)
    assert data.count(b"K\x04\x85") == 1
    with pytest.raises(DataError, match=r"not an array \(5,\) of uint8"):
        read_pickled_array(data.replace(b"K\x04\x85", b"K\x05\x85"), "x")
    with pytest.raises(DataError, match="goes on after"):
        read_pickled_array(data + b"N.", "x")
