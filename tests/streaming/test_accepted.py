"""What is accepted: texts of bytes."""

import pytest

from cbsa_torch.streaming import parse_bytes


def test_texts_of_bytes():
    texts = ("1", 7, "2 GiB", "2GiB", "500MB", "1.5KiB", "3tb")
    assert [parse_bytes(text) for text in texts] == [1, 7, 2**31, 2**31, 5 * 10**8, 1536, 3 * 10**12]
    for text in ("", "0", "-1", "2 XB", "GiB", True):
        with pytest.raises(ValueError, match="memory must be"):
            parse_bytes(text)
