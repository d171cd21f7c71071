"""Programs that run in two processes which talk to each other."""

import subprocess
import sys
from pathlib import Path


def run_two_ranks(program: str, folder: Path, last_line: str) -> None:
    """Run `program` twice, with its rank (0 or 1) and `folder` as arguments; both have to end with `last_line`."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0 and output.endswith(f"{last_line}\n"), output
