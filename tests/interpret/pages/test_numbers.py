import json
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cbsa_torch.interpret.pages.numbers import dump, finite


class Pair(NamedTuple):
    first: float
    second: list[float]


def test_what_is_not_finite_becomes_none_however_deep():
    nested = {
        "pair": Pair(math.nan, [1.0, math.inf]),
        "tensor": torch.tensor([[1.0, -math.inf], [0.5, 2.0]]),
        "array": np.array([math.nan, 3.0]),
        "single": np.float32("nan"),
        "others": (True, 3, "nan", None),
    }
    expected = {
        "pair": {"first": None, "second": [1.0, None]},
        "tensor": [[1.0, None], [0.5, 2.0]],
        "array": [None, 3.0],
        "single": None,
        "others": [True, 3, "nan", None],
    }
    assert finite(nested) == expected
    assert json.loads(dump(nested), parse_constant=pytest.fail) == expected


def test_what_json_has_no_form_for_is_refused():
    with pytest.raises(TypeError, match="not JSON serializable"):
        dump({"a": object()})
