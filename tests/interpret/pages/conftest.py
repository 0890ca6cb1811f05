import functools

import pytest
import torch

from cbsa_torch import interpret
from tests.helpers.pages import EVALUATION, HISTORY, LONG_NAME, build, compared, vit


@pytest.fixture(scope="session")
def images():
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def reported(images, tmp_path_factory):
    """The model of a family and the report about it, of the model, images and a folder alone: each made once."""

    @functools.cache
    def make(family):
        torch.manual_seed(0)
        model = vit() if family == "vit" else build(family)
        return model, interpret.report(model, images, tmp_path_factory.mktemp(family))

    return make


@pytest.fixture(scope="session")
def full_report(images, tmp_path_factory):
    """The report about a model of three layers, with all that a report can have."""
    torch.manual_seed(0)
    names = ["<cat>", *(f"a long name {i}" for i in range(11))]
    return interpret.report(
        build(depth=3),
        images,
        tmp_path_factory.mktemp("full_report"),
        title="A <b>model</b>",
        facts={"data": "5 & more", "a fact": f"with a word that is much too long for a phone: {LONG_NAME}"},
        history=HISTORY,
        evaluation={**EVALUATION, "confusion": [[1] * 12] * 12, "class_names": names},
        pictures=interpret.Pictures.of(images[:2], ["</script>", "b"]),
        labels=[0, 1, 2, 0],
    )


@pytest.fixture(scope="session")
def full_comparison(images, tmp_path_factory):
    """A comparison of three models of three layers; the last has no history, and a name too long for a phone."""
    torch.manual_seed(0)
    runs = [
        compared("cbt", build(depth=3), images, history=HISTORY),
        compared("stem_vit", build("stem_vit", depth=3), images, history=HISTORY, accuracy=None),
        compared(LONG_NAME, build("crate_cbt", depth=3), images),
    ]
    return interpret.compare(runs, tmp_path_factory.mktemp("full_comparison"), robustness_images=1)
