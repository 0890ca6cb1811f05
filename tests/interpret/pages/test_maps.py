import base64

import numpy as np
import pytest
import torch

from cbsa_torch import interpret
from cbsa_torch.interpret.pages import maps
from tests.helpers.pages import build, vit


def test_pictures_are_scaled_each_by_itself():
    inputs = torch.tensor([[[[-1.0, 1.0]]], [[[2.0, 2.5]]], [[[3.0, 3.0]]]])
    pictures = interpret.Pictures.of(inputs)
    assert pictures.images.tolist() == [[[0, 1]], [[0, 1]], [[0, 0]]]
    assert pictures.titles == ["image 1", "image 2", "image 3"]
    colour = interpret.Pictures.of(torch.stack([inputs[0, 0], inputs[1, 0], inputs[2, 0]])[None])
    assert colour.images.tolist() == [[[[0, 0.75, 1], [0.5, 0.875, 1]]]]


def test_pictures_lose_their_normalisation():
    image = torch.rand(2, 3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    inputs = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    pictures = interpret.Pictures.of(inputs, ["a", "b"], mean=mean, std=std)
    np.testing.assert_allclose(pictures.images, image.permute(0, 2, 3, 1), atol=1e-6)
    with pytest.raises(ValueError, match="mean and std must both be given or neither"):
        interpret.Pictures.of(inputs, mean=mean)


def test_maps_on_the_page_are_those_measured(images):
    model = build()
    pictures = interpret.Pictures.of(images)
    measured = maps.measure_maps(model, pictures)
    with interpret.capture(model) as records:
        model(images)
    expected = interpret.cls_attention_maps(records["blocks.1.attn"])
    layer = maps.page_data(measured, pictures)["layers"][1]
    drawn = np.frombuffer(base64.b64decode(layer["maps"]), np.uint8).reshape(4, 3, 8, 8)
    own = torch.cat([expected.mean(1, keepdim=True), expected], 1).numpy()
    low, high = own.min((2, 3), keepdims=True), own.max((2, 3), keepdims=True)
    np.testing.assert_allclose(drawn / 255, (own - low) / (high - low), atol=0.51 / 255)
    fields = np.frombuffer(base64.b64decode(layer["fields"]), np.uint8).reshape(3, 16, 8, 8)
    attention = records["blocks.1.attn"].stages.attention[0, 1, 5, 1:].view(8, 8)  # head 2, representative 6
    assert fields[2, 5].argmax() == attention.argmax().item()


@pytest.mark.parametrize(
    ("family", "note"),
    [
        ("cbt", None),
        ("crate", None),
        ("tost", "TSSA compares no token with another"),
        ("linear_cbt", "LinearCBSA forms no attention matrix"),
        ("agent", "The matrix of AgentAttention is the product"),
    ],
)
def test_maps_that_are_no_row_of_an_attention_matrix_say_what_they_are(family, note, images):
    notes = maps.measure_maps(build(family), interpret.Pictures.of(images)).notes
    assert [found.startswith(note) for found in notes] == ([True] if note else [])


@pytest.mark.parametrize(
    ("options", "token"),
    [
        ({}, "class token"),
        ({"class_token": False, "global_pool": "avg"}, "first patch"),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 2}, "first token"),
    ],
)
def test_maps_say_whose_they_are(options, token, images):
    assert maps.measure_maps(vit(**options), interpret.Pictures.of(images)).token == token


def test_evenly_spaced_takes_first_and_last():
    assert maps.evenly_spaced(3, 6) == [0, 1, 2]
    assert maps.evenly_spaced(12, 6) == [0, 2, 4, 7, 9, 11]
    assert maps.evenly_spaced(5, 1) == [0]
