"""Several runs in one process, one after the other: the ``main`` of tests.helpers.processes."""

from cbsa_torch.train import load_config, train
from cbsa_torch.train.engine.accelerate import leave_process_group


def main(paths):
    """Train by each of the YAML files."""
    for path in paths:
        train(load_config(path))
    leave_process_group()
