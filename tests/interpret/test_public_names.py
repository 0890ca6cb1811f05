from cbsa_torch import interpret


def test_every_public_name_is_there_and_documented():
    for name in interpret.__all__:
        assert getattr(interpret, name).__name__ == name
        assert f"`{name}`" in interpret.__doc__
    assert set(interpret.__all__) <= set(dir(interpret))
