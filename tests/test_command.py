"""The command line as a whole: it prints its own lines alone, and what the machine refuses is one line."""

import errno
import importlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from gci_kernels import cli, files, quiet

NOISE = '''
"""Runs before everything else: what other packages say while transformers is imported."""
import importlib.abc, logging, sys, warnings

class Noisy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "transformers":
            logging.getLogger("torchao").warning("NOISE: a library is missing")
            warnings.warn("NOISE: deprecated", FutureWarning)

sys.meta_path.insert(0, Noisy())
'''


@pytest.fixture
def noisy(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing transformers is noisy."""
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "sitecustomize.py").write_text(NOISE)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "noise"), "GCI_CACHE": str(tmp_path / "cache")}


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_info_prints_its_own_lines_alone(noisy, tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "gci_kernels", "info", env=noisy | {"COLUMNS": "80"}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    facts = [line for line in done.stdout.splitlines() if line.startswith(("CUDA kernels ", "cache folder "))]
    assert "GCI_CUDA_ARCH_LIST=" in facts[0] and facts[1].endswith(str(tmp_path / "cache"))


def test_a_failing_command_prints_its_error_alone(noisy, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("gci-kernels")
    done = run(str(script), "convert", "nothing", "target", env=noisy, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == ["nothing does not exist"]


def test_debug_brings_the_notices_back_and_the_noise_is_there(noisy, tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "gci_kernels", "--help", env=noisy | {"GCI_DEBUG": "1"}, cwd=tmp_path)
    assert done.returncode == 0
    assert "NOISE: a library is missing" in done.stderr and "FutureWarning: NOISE: deprecated" in done.stderr


@pytest.mark.parametrize(
    ("argv0", "original", "expected"),
    [
        ("/x/bin/gci-kernels", ["python", "/x/bin/gci-kernels", "info"], True),
        ("C:\\x\\gci-kernels.exe" if os.name == "nt" else "gci-kernels.exe", ["python"], True),
        ("-m", ["python", "-X", "dev", "-m", "gci_kernels", "info"], True),
        ("-m", ["python", "-m", "gci_kernels.bench.roofline"], True),
        ("-m", ["python", "-m", "pytest"], False),
        ("train.py", ["python", "train.py", "-m", "gci_kernels"], False),
        ("", ["python"], False),
        ("-c", ["python", "-c", "import gci_kernels"], False),
    ],
)
def test_only_a_command_of_ours_is_silent(argv0: str, original: list[str], expected: bool) -> None:
    assert quiet.is_command(argv0, original) is expected


@pytest.mark.parametrize(
    ("argv0", "debug", "silent"), [("gci-kernels", None, True), ("gci-kernels", "1", False), ("train.py", None, False)]
)
def test_silence_keeps_our_warnings_and_all_errors(monkeypatch, caplog, argv0, debug, silent: bool) -> None:
    monkeypatch.setattr(sys, "argv", [argv0])
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.delenv("GCI_DEBUG", raising=False)
    if debug:
        monkeypatch.setenv("GCI_DEBUG", debug)
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            importlib.reload(quiet)
            warnings.warn("theirs", FutureWarning, stacklevel=1)
            warnings.warn("gci_kernels: ours", RuntimeWarning, stacklevel=1)
            logging.getLogger("torchao").warning("theirs")
            logging.getLogger("torchao").error("an error")
        assert [str(warning.message) for warning in seen] == ["theirs"] * (not silent) + ["gci_kernels: ours"]
        assert [record.message for record in caplog.records] == ["theirs"] * (not silent) + ["an error"]
    finally:
        logging.disable(before)
        monkeypatch.delenv("TQDM_DISABLE", raising=False)


def test_a_user_who_asks_for_warnings_gets_them(monkeypatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            quiet.silence()
            warnings.warn("theirs", FutureWarning, stacklevel=1)
        assert len(seen) == 1
    finally:
        logging.disable(before)
        os.environ.pop("TQDM_DISABLE", None)


# What the machine refuses


def raising(error: BaseException):
    def fails(argv: list[str] | None) -> int:
        raise error

    return fails


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (files.CacheError("the cache folder is a file"), 1, "the cache folder is a file"),
        (OSError(errno.ENOSPC, "No space left on device", "x.json"), 1, "[Errno 28] No space left on device: 'x.json'"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "[Errno 13] Permission denied: 'x'"),
    ],
)
def test_what_the_machine_refuses_is_one_line(monkeypatch, capsys, error, status: int, line: str) -> None:
    monkeypatch.setattr(cli, "_run", raising(error))
    assert cli.main([]) == status
    assert capsys.readouterr().err == line + "\n"
    monkeypatch.setenv("GCI_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main([])


@pytest.mark.parametrize("error", [RuntimeError("a fault of ours"), FileNotFoundError(errno.ENOENT, "no", "x")])
def test_our_own_faults_keep_their_traceback(monkeypatch, error) -> None:
    monkeypatch.setattr(cli, "_run", raising(error))
    with pytest.raises(type(error)):
        cli.main([])


def refuse(monkeypatch, number: int) -> None:
    """Nothing can be made in any folder, as on a read-only or a full file system."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refused)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_folder_that_refuses_is_named(monkeypatch, tmp_path: Path, number: int) -> None:
    monkeypatch.setenv("GCI_CACHE", str(tmp_path / "cache"))
    assert files.make_cache_dir() == tmp_path / "cache"
    refuse(monkeypatch, number)
    with pytest.raises(files.CacheError, match=f"^the cache folder {tmp_path}/cache cannot be used: ") as error:
        files.make_cache_dir()
    assert str(error.value).endswith(f"{os.strerror(number)}; GCI_CACHE=FOLDER names another one")


@pytest.mark.parametrize("folder", ["file", "file/deeper"])
def test_a_file_in_place_of_the_cache_folder_is_named(monkeypatch, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GCI_CACHE", str(tmp_path / folder))
    with pytest.raises(files.CacheError, match=f"the cache folder {tmp_path}/{folder} cannot be used: "):
        files.make_cache_dir()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_file_as_it_was(monkeypatch, tmp_path: Path, error) -> None:
    path = tmp_path / "records.json"
    files.write_whole(path, "first")
    mode = path.stat().st_mode & 0o777

    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(Path, "replace", fails)
        files.write_whole(path, "second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    files.write_whole(path, "third")
    (tmp_path / "plain").touch()
    assert path.read_text() == "third" and mode == (tmp_path / "plain").stat().st_mode & 0o777


@pytest.mark.parametrize("command", ["verify", "tune"])
def test_what_keeps_results_asks_for_its_folder_first(monkeypatch, tmp_path: Path, capsys, command: str) -> None:
    """Neither checks nor tunes for minutes to find out then that nothing can be kept."""
    import torch

    from gci_kernels.bench import tune
    from gci_kernels.proof import verify

    (tmp_path / "file").touch()
    monkeypatch.setenv("GCI_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "triton_obstacle", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", pytest.fail)
    monkeypatch.setattr(verify, "verify", pytest.fail)
    assert cli.main([command, *(["--device", "cuda"] if command == "verify" else [])]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the cache folder {tmp_path}/file cannot be used: ")
