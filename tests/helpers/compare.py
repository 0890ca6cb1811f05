"""Errors relative to the largest entry of what is expected."""


def relative_error(actual, expected):
    scale = expected.abs().max()
    difference = (actual - expected).abs().max()
    return (difference / scale).item() if scale > 0 else difference.item()


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"
