"""Several processes that share the tokens against one that has them all."""

import pytest

from tests.helpers import on_ranks, processes


@pytest.mark.parametrize(
    ("ranks", "checks"),
    [
        (2, "models training dropout drop_path coordinates compiled training_sets errors_of_sets"),
        (3, "mixers operator exchanges errors sets"),
        (4, "models errors training"),
        pytest.param(2, "compiled_mixers compiled_models", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_tokens_equal_one_process(ranks, checks):
    result = processes.run(ranks, *checks.split(), main=on_ranks.main, timeout=300)
    assert result.returncode == 0, result.stderr
