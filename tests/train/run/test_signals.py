"""A run that is asked to stop saves its state first, wherever it is."""

import os
import signal

import pytest

from cbsa_torch import cli
from cbsa_torch.train import train, trainer
from cbsa_torch.train.config import dump_yaml
from cbsa_torch.train.errors import InterruptedRun
from cbsa_torch.train.run.signals import StopRequests
from cbsa_torch.train.tasks import classification
from tests.helpers.processes import Command
from tests.helpers.runs import STEPS, assert_same_run, during_training_step, last, states, wait_for_state


@pytest.fixture(autouse=True)
def heeded():
    """Ctrl-C is not ignored, as it is where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number):
    def act(loss, logits):
        os.kill(os.getpid(), number)
        return loss

    return act


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_exactly(config, whole, monkeypatch, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        during_training_step(patch, STEPS + 2, send(number))
        expected = (
            rf"stopped by {number.name}; the last training state is that of epoch 1 and 2 batches, the best "
            rf"epoch was 1; go on with: cbsa train --output {config.output} --resume"
        )
        with pytest.raises(InterruptedRun, match=expected):
            train(config)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert last(config)["progress"]["step"] == STEPS + 2
    train(config)
    assert_same_run(config, whole)


def test_a_signal_during_validation_keeps_the_whole_epoch_of_training(config, whole, monkeypatch):
    task = classification.Classification
    evaluate = task.evaluate
    with monkeypatch.context() as patch:

        def patched(*args, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*args, **options)

        patch.setattr(task, "evaluate", patched)
        with pytest.raises(InterruptedRun, match=f"epoch 0 and {STEPS} batches"):
            train(config)
    during_training_step(monkeypatch, 2 * STEPS, lambda loss, logits: pytest.fail("trained again"))
    train(config)
    assert_same_run(config, whole)


def test_a_signal_in_the_last_validation_but_one_moment_too_late_ends_the_run_as_usual(config, monkeypatch):
    save = trainer.save_weights

    def patched(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args)

    monkeypatch.setattr(trainer, "save_weights", patched)
    config.optim.epochs = 1
    assert train(config).best_epoch == 1


def test_the_second_signal_acts_at_once(config, monkeypatch):
    def twice(loss, logits):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    during_training_step(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert not states(config)


def test_a_handler_that_python_did_not_install_is_given_up_for_the_default(monkeypatch):
    """A program in C around Python may have one: Python calls it None, and cannot put it back."""
    before = signal.getsignal(signal.SIGTERM)
    install = signal.signal
    try:
        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", lambda number, handler: (install(number, handler), None)[1])
            with StopRequests() as stop:
                os.kill(os.getpid(), signal.SIGTERM)
                assert stop
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def in_a_session(args):
    """A process group of its own, like that of a command in a terminal."""
    os.setsid()
    return cli.main(args)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_the_command_says_by_its_exit_code_that_it_can_be_continued(config, tmp_path, number, workers):
    """The signal goes to all of its processes, as from a terminal, from systemd or timeout."""
    config.optim.epochs, config.data.workers = 2000, workers
    config.optim.batch_size, config.engine.save_steps = 1, 1  # a state while the workers are at work
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    with Command(1, "train", "--config", str(tmp_path / "config.yaml"), main=in_a_session) as command:
        wait_for_state(command, config)
        os.killpg(command.pids[0], number)
        result = command.wait(30)
    assert result.returncode == 75
    assert f"stopped by {number.name}; the last training state is that of epoch" in result.stderr
