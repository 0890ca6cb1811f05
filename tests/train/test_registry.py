"""The table of tasks: a configuration leads to its task, under one name."""

import pytest

from cbsa_torch.train.config import from_dict, to_dict
from cbsa_torch.train.registry import TASKS, read_config, task_of


@pytest.mark.parametrize("name", TASKS)
def test_a_configuration_is_read_as_that_of_the_task_it_names(name):
    config_class, task_class = TASKS[name]
    config = from_dict(config_class, {"seed": 7}, "x")
    read = read_config(to_dict(config), "x")
    assert type(read) is config_class
    assert read == config
    task = task_of(read)
    assert type(task) is task_class
    assert task.config is read


@pytest.mark.parametrize("name", TASKS)
def test_other_data_leave_a_task_and_its_settings_as_they_are(name):
    task = task_of(from_dict(TASKS[name][0], {"seed": 7}, "x"))
    data = type(task.config.data)(root="elsewhere")
    other = task.with_data(data)
    assert (type(other), other.config.seed, other.config.data) == (type(task), 7, data)
    assert task.config.data.root is None
