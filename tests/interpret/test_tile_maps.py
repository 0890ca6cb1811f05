"""Maps of tiles: values at their places."""

import numpy as np
import pytest
import torch

from cbsa_torch.interpret import coordinate_map


def test_tiles_are_drawn_at_their_places():
    """On a lattice of four columns and three rows with two holes, from far away; two tiles share a place."""
    places = torch.tensor(
        [[0, 0], [1, 0], [3, 0], [0, 1], [1, 1], [2, 1], [3, 1], [0, 2], [1, 2], [3, 2], [3, 2]]
    )
    coords, values = 512 * places + torch.tensor([90_000, 7_000]), torch.arange(11.0)
    for tile_size in (512.0, None):  # None: by the nearest neighbours
        axis, _ = coordinate_map(coords, values, tile_size, title="a < b").axes
        (image,) = axis.images
        shown = np.ma.filled(image.get_array(), np.nan)
        expected = [[0, 1, np.nan, 2], [3, 4, 5, 6], [7, 8, np.nan, 9.5]]
        np.testing.assert_array_equal(shown, expected)
        assert image.get_extent() == [90_000, 90_000 + 4 * 512, 7_000 + 3 * 512, 7_000]
    rounded = (358.4 * torch.arange(40.0)).long()[:, None].expand(-1, 2)  # pixels, of tiles of no whole number
    diagonal = coordinate_map(rounded, torch.arange(40.0), 358.4).axes[0].images[0].get_array()
    np.testing.assert_array_equal(np.ma.filled(diagonal, np.nan).diagonal(), np.arange(40))
    assert coordinate_map(coords[:1], values[:1]).axes[0].images[0].get_array().shape == (1, 1)
    for bad, message in (
        ((coords[:, :1], values), r"coords must have shape \(N, 2\)"),
        ((coords, values[1:]), r"values must have shape \(11,\)"),
        ((coords, values / 0), "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            coordinate_map(*bad)
