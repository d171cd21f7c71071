"""The command of the package."""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is made here, nothing is fetched

import gci_kernels  # noqa: E402

from ..machine import commit, versions, write_json  # noqa: E402
from . import __doc__ as about  # noqa: E402
from .sweep import sweep  # noqa: E402
from .table import METHODS, Row, counts  # noqa: E402
from .tiny import classes  # noqa: E402

COMMIT = commit()  # at the start, before the output file counts as a change


def main(argv: list[str] | None = None) -> int:
    """Checks the chosen classes, writes the rows, and prints the counts."""
    parser = argparse.ArgumentParser(prog="python -m bench.compatibility", description=(about or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--only", action="append", help="a part of classes' names; may be given several times")
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of N parts of the classes (default: all)")
    parser.add_argument("--join", action="store_true", help="keep the rows of other classes that --json has already")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all; may be given several times")
    parser.add_argument("--processes", type=int, default=1, help="classes at a time, each on one thread (default: 1)")
    args = parser.parse_args(argv)
    if args.join and not args.json:
        parser.error("--join needs --json")
    part, parts = map(int, args.part.split("/"))
    names = [name for name in classes() if any(each in name for each in args.only or [""])][part - 1 :: parts]
    methods = args.method or list(METHODS)

    kept = json.loads(args.json.read_text(encoding="utf-8"))["classes"] if args.join and args.json.exists() else []
    rows: dict[str, Row] = {row["name"]: row for row in kept if row["name"] not in names}
    before = len(rows)

    def done(row: Row, seconds: float) -> None:
        rows[row["name"]] = row
        outcome = row.get("left_out") or " ".join(row["methods"][method]["outcome"] for method in methods)
        count = f"{len(rows) - before}/{len(names)}"
        print(f"[{count}] {row['name']}: {outcome}  {seconds:.1f} s", file=sys.stderr, flush=True)
        if args.json:
            # After every class, so that a run that is stopped leaves its rows.
            result = {"versions": versions() | {"gci_kernels": gci_kernels.__version__}, "commit": COMMIT}
            write_json(args.json, result | {"classes": [rows[name] for name in sorted(rows)]})

    sweep(names, methods, args.processes, done)
    print(counts({"classes": rows.values()}, methods))
    return 0


if __name__ == "__main__":
    sys.exit(main())
