"""Tuning: what is tried, what is kept, and when what was kept counts. The launches themselves: triton_cases.py."""

import argparse
import dataclasses
import json

import pytest
import torch

from gci_kernels.bench import tune
from gci_kernels.hardware import kernels, records, tuned
from gci_kernels.ops.bottleneck.config import choose_project_config

GPU = torch.device("cuda", 0)
ARGUMENTS = (8192, 4096, 16, torch.bfloat16, "sm_90")
X, M = torch.randn(6, 5), torch.randn(5, 3)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """An H200 by name, and an empty cache folder."""
    monkeypatch.setenv("GCI_CACHE", str(tmp_path))
    monkeypatch.setattr(records, "gpu", lambda device: ("NVIDIA H200", "sm_90"))
    tuned._table.cache_clear()
    records.warn_once.cache_clear()


def chosen():
    return choose_project_config(*ARGUMENTS)


def target(answer=lambda config: X @ M):
    """A launch that asks for its configuration, as a launcher does, and computes `answer` of it."""

    def run():
        return (answer(tuned.config("project", torch.device("cpu"), *ARGUMENTS)),)

    launch = kernels.get_launch("project")[1]
    return tune.Target(launch, ARGUMENTS, run, (X.double() @ M.double(),), (1e-2,))


def seconds_of(cost):
    """A clock: the time is what `cost` says of the configuration in use."""

    def seconds(run):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            real = tuned.config
            patch.setattr(tuned, "config", lambda *arguments: seen.append(real(*arguments)) or seen[-1])
            run()
        return cost(seen[0])

    return seconds


@pytest.mark.smoke
def test_the_best_of_each_field_wins_and_is_kept():
    found = tune.tune(target(), GPU, seconds_of(lambda c: abs(c.block_t - 128) + abs(c.num_stages - 4) + 1.0))
    assert found.best == dataclasses.replace(chosen(), block_t=128, num_stages=4)
    assert found.after == 1.0 < found.before and not found.left_out
    assert tuned.config("project", GPU, *ARGUMENTS) == found.best
    other = (4096, *ARGUMENTS[1:])
    assert tuned.config("project", GPU, *other) == choose_project_config(*other)
    assert tuned.config("project", torch.device("meta"), *ARGUMENTS) == chosen(), "what has no GPU was not tuned"


def test_noise_changes_nothing():
    found = tune.tune(target(), GPU, seconds_of(lambda c: 1.0 if c == chosen() else 0.99))
    assert found.best == chosen() and not tuned.path().exists()


def test_what_is_wrong_or_does_not_compile_is_left_out_and_counted():
    def answer(config):
        if config.block_t == 256:
            raise RuntimeError("out of resources: shared memory")
        return X @ M * (1.5 if config.num_warps == 8 else 1)

    found = tune.tune(target(answer), GPU, seconds_of(lambda c: 1 / c.block_t / c.num_warps))
    assert found.best.block_t == 128 and found.best.num_warps == 4
    assert found.left_out == {"RuntimeError": 1, "wrong": 1}


def test_a_wrong_choice_to_begin_with_is_an_error():
    with pytest.raises(RuntimeError, match="fails with the configuration chosen for it"):
        tune.tune(target(lambda config: X @ M * 2), GPU, seconds_of(lambda c: 1.0))


def test_kept_again_replaces_and_keeps_the_others():
    for tokens, stages in ((64, 2), (128, 3), (64, 5)):
        best = dataclasses.replace(chosen(), num_stages=stages)
        tuned.keep("project", (tokens, *ARGUMENTS[1:]), best, GPU)
    entries = json.loads(tuned.path().read_text())["tuned"]
    assert [(entry["arguments"][0], entry["config"]["num_stages"]) for entry in entries] == [(128, 3), (64, 5)]


@pytest.mark.parametrize("field", ("gpu", "capability", "triton", "digest"))
def test_an_entry_of_another_machine_or_version_does_not_count(field):
    best = dataclasses.replace(chosen(), num_stages=5)
    tuned.keep("project", ARGUMENTS, best, GPU)
    assert tuned.config("project", GPU, *ARGUMENTS) == best
    content = json.loads(tuned.path().read_text())
    content["tuned"][0][field] = "another"
    tuned.path().write_text(json.dumps(content))
    tuned._table.cache_clear()
    assert tuned.config("project", GPU, *ARGUMENTS) == chosen()


def test_a_damaged_file_counts_as_empty_with_a_warning():
    tuned.path().write_text('{"tuned": [')
    with pytest.warns(RuntimeWarning, match="tuned.json could not be read"):
        assert tuned.config("project", GPU, *ARGUMENTS) == chosen()


@pytest.mark.parametrize("part", ("arguments", "config"))
def test_a_damaged_entry_is_left_out_with_a_warning(part):
    tuned.keep("project", ARGUMENTS, dataclasses.replace(chosen(), num_stages=5), GPU)
    content = json.loads(tuned.path().read_text())
    del content["tuned"][0][part]
    tuned.path().write_text(json.dumps(content))
    tuned._table.cache_clear()
    with pytest.warns(RuntimeWarning, match="an entry of project is not whole"):
        assert tuned.config("project", GPU, *ARGUMENTS) == chosen()


@pytest.mark.parametrize("launch", [launch for _, launch in kernels.LAUNCHES.values()], ids=lambda launch: launch.name)
def test_every_candidate_is_of_a_field_of_the_configuration(launch):
    fields = [field.name for field in dataclasses.fields(launch.config_class)]
    assert launch.candidates.keys() <= set(fields) and callable(launch.choose)


def test_trying_ends_with_an_error():
    with pytest.raises(KeyError), tuned.trying("project", "candidate"):
        assert tuned.config("project", GPU, *ARGUMENTS) == "candidate"
        raise KeyError
    assert tuned.config("project", GPU, *ARGUMENTS) == chosen()


def test_table():
    found = tune.tune(target(), GPU, seconds_of(lambda c: abs(c.block_t - 128) + 1.0))
    columns = tune.table([found], "NVIDIA H200").columns
    cells = {column.header: list(column.cells)[0] for column in columns}
    assert cells["changed"] == "block_t=128" and cells["for"] == "8192 4096 16 bfloat16 sm_90"


def test_without_a_gpu_it_says_so(capsys):
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    assert tune.main(parser.parse_args([])) == 1
    assert "Nothing to tune here" in capsys.readouterr().err
