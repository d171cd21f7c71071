"""The CUDA kernels as the extension offers them, without a GPU: what is built, and what the launches refuse."""

import io
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from gci_kernels import native
from gci_kernels.proof import info


@pytest.fixture
def extension():
    if not native.extension().has_cuda:
        pytest.skip(f"the CUDA kernels are {native.CUDA_BUILD}")
    return native.extension()


def test_info_shows_what_was_built(monkeypatch):
    def shown() -> str:
        console = Console(width=200, file=io.StringIO())
        info.show(console)
        return next(line for line in console.file.getvalue().splitlines() if "CUDA kernels" in line)

    assert native.CUDA_BUILD in shown()
    monkeypatch.setattr(native, "CUDA_BUILD", "not built: no nvcc [anywhere]")
    assert "not built: no nvcc [anywhere]" in shown()


def test_without_cuda_the_reason_is_named(monkeypatch):
    class Plain:
        has_cuda = False

    monkeypatch.setattr(native, "_extension", Plain())
    monkeypatch.setattr(native, "CUDA_BUILD", "not built: GCI_BUILD_CUDA=0")
    with pytest.raises(ImportError, match="not built: GCI_BUILD_CUDA=0. They need nvcc 12.4 to 13.x"):
        native.cuda_extension()


def test_importing_touches_no_driver(extension):
    """The loader's own trace: no libcuda is looked for before the first launch, and then it is."""
    script = (
        "import importlib.util as u; s = u.spec_from_file_location('_native', {!r}); m = u.module_from_spec(s)\n"
        "s.loader.exec_module(m); print(m.cuda_build, m.decode_splits(1, 16, 4096)); {}"
    )
    step = "m.DecodeStep(0, 0, 4, 4, [0], [(64, 0, 0, 1, 0, 0, 1.0, 0, 1)])"
    launch = f"m.cuda_project({step}, 64, 4, 64, 1, 1, 0)"

    def trace(then: str) -> str:
        command = [sys.executable, "-c", script.format(extension.__file__, then)]
        environment = os.environ | {"LD_DEBUG": "libs"}
        return subprocess.run(command, env=environment, capture_output=True, text=True).stderr

    assert "libgomp" in trace("pass") and "libcuda" not in trace("pass")
    if not torch.cuda.is_available():  # the addresses are none
        assert "libcuda.so" in trace(launch)


GROUP = dict(A=64, router=64, B=64, rank=4, experts=2, top_k=2, scaling=1.0, first=0, count=2)
FULL = (64, 64, 64, 4, 2, 2, 1.0, 0, 2)


def launch(extension, kernel: str, **changes) -> None:
    """One of the step's halves, on addresses that are none; `x` is x or y, and `length` in or out."""
    given = dict(dtypes=(1, 0), x=64, ld=8, length=8, rows=[0, 1], partial=64, splits=1, columns=10) | changes
    group = tuple((GROUP | {key: value for key, value in changes.items() if key in GROUP}).values())
    length = given["length"]
    step = extension.DecodeStep(*given["dtypes"], length, length, given["rows"], given.get("groups", [group]))
    run = getattr(extension, f"cuda_{kernel}")
    run(step, given["x"], given["ld"], given["partial"], given["splits"], given["columns"], 0)


BOTH = [
    ("x must be float32, bfloat16 or float16", dict(dtypes=(2, 2))), ("x must be", dict(dtypes=(9, 0))),
    ("the adapter must be in the dtype of x or in float32", dict(dtypes=(0, 1))), ("adapter", dict(dtypes=(1, 3))),
    ("tokens must be 1 to 16", dict(rows=[])), ("groups must be 1 to 16", dict(groups=[])),
    ("splits must be 1 to 32", dict(splits=0)), ("splits", dict(splits=33)),
    ("columns must be 1 to 512", dict(columns=0)), ("columns must be 1", dict(columns=513)),
    ("columns must be at least", dict(columns=9)), ("partial must be an aligned address", dict(partial=0)),
    ("partial", dict(partial=66)), ("rows must not be negative", dict(rows=[0, -1])),
    ("rank must be 1 to 512", dict(rank=0)), ("rank", dict(rank=513)), ("experts must be 0 to 256", dict(experts=-1)),
    ("experts must be 0 to 256", dict(rank=1, experts=257)),
    ("more than 512 columns", dict(rank=256)), ("top_k must be 1 to experts", dict(top_k=0)), ("top_k", dict(top_k=3)),
    ("a group's tokens must be", dict(first=-1)), ("a group's tokens", dict(count=0)),
    ("a group's tokens", dict(count=3)), ("a group's tokens", dict(first=2**31 - 1)),
    ("a token is in two groups", dict(groups=[FULL, (*FULL[:-2], 1, 1)])),
    ("two tokens name one row", dict(rows=[3, 3])),
]  # fmt: skip


@pytest.mark.parametrize(("why", "changes"), BOTH, ids=[str(changes) for _, changes in BOTH])
def test_both_launches_refuse(extension, why, changes):
    for kernel in ("project", "expand"):
        with pytest.raises(ValueError, match=f"^cudaErrorInvalidValue: .*{why}"):
            launch(extension, kernel, **changes)


def test_a_step_holds_so_many_tokens_and_groups(extension):
    for changes in (dict(rows=list(range(17))), dict(groups=[FULL] * 17)):
        with pytest.raises(ValueError, match="takes at most 16 tokens and as many groups"):
            launch(extension, "project", **changes)
    with pytest.raises(ValueError, match="attention must be given for every group or for none"):
        extension.DecodeStep(0, 0, 8, 8, [0, 1], [FULL[:-1] + (1,)] * 2, [(64, 2, False)])


ONE = [
    ("in must be 1 to 2", "out must be 1 to 2", dict(length=0)), ("in must", "out must", dict(length=2**31 + 1)),
    ("x must be an aligned address", "y must be an aligned address", dict(x=0)), ("x must", "y must", dict(x=63)),
    ("the rows of x must not overlap", "the rows of y must not overlap", dict(ld=7)),
    ("A must be an aligned address", None, dict(A=0)), ("A must", None, dict(A=66)),
    ("router must be an aligned address", None, dict(router=0)), (None, "B must be an aligned address", dict(B=0)),
    (None, "B must", dict(B=1)),
]  # fmt: skip


@pytest.mark.parametrize(("project", "expand", "changes"), ONE, ids=[str(changes) for *_, changes in ONE])
def test_one_launch_refuses(extension, project, expand, changes):
    for kernel, why in (("project", project), ("expand", expand)):
        if why:
            with pytest.raises(ValueError, match=f"^cudaErrorInvalidValue: {why}"):
                launch(extension, kernel, **changes)


NARROW, WIDE = (64, 0, 64, 4, 0, 0, 1.0, 0, 1), (64, 0, 64, 8, 0, 0, 1.0, 1, 1)


def attend(extension, **changes) -> None:
    """One token of each of two sequences, with adapters of rank 4 and 8."""
    given = dict(
        dtypes=(1, 0), length=8, rows=[0, 1], groups=[NARROW, WIDE], attentions=[(64, 1, True), (64, 2, False)],
        x=64, ld=8, kv=(64, 80, 16, 5), past=64, segments=(0, 0), partial=64, columns=8,
    ) | changes  # fmt: skip
    types, length, rows, groups, attentions, *rest = given.values()
    extension.cuda_attend(extension.DecodeStep(*types, length, 1, rows, groups, attentions), *rest, 0)


def wide(**changes) -> list[tuple]:
    """The groups, the second one changed."""
    return [NARROW, tuple((dict(zip(GROUP, WIDE, strict=True)) | changes).values())]


ATTEND = [
    ("x must be float32", dict(dtypes=(2, 2))), ("the adapter must", dict(dtypes=(3, 1))),
    ("tokens must be 1 to 16", dict(rows=[])), ("rank must be 1 to 512", dict(groups=wide(rank=0))),
    ("rank", dict(groups=wide(rank=513))), ("columns must be at least", dict(columns=7)),
    ("an adapter that attends must have no experts", dict(groups=wide(router=64, experts=1, top_k=1), columns=9)),
    ("heads must divide rank", dict(attentions=[(64, 1, True), (64, 3, False)])),
    ("heads", dict(attentions=[(64, 1, True), (64, 0, False)])),
    ("a head must have at most 128 columns", dict(groups=wide(rank=258), columns=258)),
    ("in must be 1 to 2", dict(length=0)), ("capacity must be 1 to 2", dict(kv=(64, 80, 16, 0))),
    ("capacity", dict(kv=(64, 80, 16, 2**31 + 1))), ("x must be an aligned", dict(x=0)),
    ("A must be an aligned", dict(groups=wide(A=1))), ("two tokens name one row", dict(rows=[3, 3])),
    ("a token is in two groups", dict(groups=wide(first=0))), ("partial must be an aligned", dict(partial=0)),
    ("qkv must be an aligned", dict(attentions=[(64, 1, True), (66, 2, False)])),
    ("qkv", dict(attentions=[(0, 1, True), (64, 2, False)])), ("qkv", dict(attentions=[])),
    ("kv must be an aligned", dict(kv=(65, 80, 16, 5))), ("kv must", dict(kv=(0, 80, 16, 5))),
    ("past must be an aligned", dict(past=0)), ("past", dict(past=66)),
    ("segments must be an aligned", dict(segments=(2, 5))), ("the rows of x", dict(ld=7)),
    ("a row of kv must hold 2", dict(kv=(64, 80, 15, 5))), ("a row of kv", dict(kv=(64, 2**40, 2**31 + 1, 5))),
    ("the sequences of kv must not overlap", dict(kv=(64, 79, 16, 5))), ("the seq", dict(kv=(64, 95, 20, 5))),
]  # fmt: skip


@pytest.mark.parametrize(("why", "changes"), ATTEND, ids=[str(changes) for _, changes in ATTEND])
def test_attend_refuses(extension, why, changes):
    with pytest.raises(ValueError, match=f"^cudaErrorInvalidValue: {why}"):
        attend(extension, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the addresses are none")
def test_without_a_driver_the_error_has_cudas_name(extension):
    name = "^cudaError(InsufficientDriver|NoDevice|InitializationError): "
    for kernel in ("project", "expand"):
        with pytest.raises(RuntimeError, match=name):
            launch(extension, kernel)
    one = dict(rows=[7], groups=[NARROW], attentions=[(64, 2, False)], kv=(64, 1, 8, 5))  # nothing can overlap
    for fits in ({}, dict(kv=(64, 96, 20, 5)), dict(kv=(64, 16, 999, 1)), dict(segments=(64, 5)), one):
        with pytest.raises(RuntimeError, match=name):
            attend(extension, **fits)


def test_splits(extension):
    splits = extension.decode_splits
    assert splits(1, 16, 4096) == 16 and splits(1, 40, 4096) == 16  # 256 values of x for each
    assert splits(1, 16, 14336) == 28 and splits(1, 16, 1) == splits(1, 16, 256) == 1
    for tokens in range(1, 17):
        for columns in (1, 16, 40, 128, 512):
            for inside in (1, 255, 257, 2048, 4096, 11008, 14336, 100_000, 2**31):
                chosen = splits(tokens, columns, inside)
                units = -(-inside // 256)
                part = -(-units // chosen)
                assert 1 <= chosen <= 32 and (chosen - 1) * part < units <= chosen * part, "no part is empty"
                assert chosen == 1 or chosen * tokens * columns <= 4096
