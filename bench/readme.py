"""The measured tables and the plot in README and docs, made from bench/results and never by hand.

    python -m bench.readme [--root FOLDER]

The text between `<!-- made by python -m bench.readme: NAME -->` and `<!-- end -->` is replaced by a table. The plot's
metadata has the digest of the file that it was drawn from, so that a test can check that both belong together.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .compatibility import table as compatibility
from .forgetting.report import short_table
from .markdown import at_commit, table
from .report import COLUMNS, TIMED, adapter_dtype, adapter_size, display_name, draw, medians, number, rounds

RESULTS = Path("bench", "results")
SOURCE, PICTURE = RESULTS / "cpu.json", RESULTS / "cpu.png"
DIGEST = "Source-SHA256"  # the name of the entry in the plot's metadata
_MARKED = re.compile(r"(<!-- made by python -m bench\.readme: (\S+) -->\n).*?(<!-- end -->)", flags=re.S)


def documents(root: Path) -> dict[Path, str]:
    """Every Markdown file below `root` (a checkout) that has tables, with its text as it must be.

    Raises:
        ValueError: a table's name is unknown.
        OSError: a result file is missing.
    """
    found = {}
    for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if _MARKED.search(text):
            found[path] = _MARKED.sub(lambda found: f"{found[1]}{_content(found[2], root)}\n{found[3]}", text)
    return found


def _content(name: str, root: Path) -> str:
    if name not in CONTENTS:
        raise ValueError(f"there is no table {name!r}; known: {', '.join(CONTENTS)}")
    return CONTENTS[name](root)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _all_tables(root: Path) -> str:
    """Every result file of `gci-kernels bench`, with its name as a heading."""
    paths = sorted((root / RESULTS).glob("cpu*.json"))
    return "\n\n".join(f"### {path.name}\n\n{measured(_read(path))}" for path in paths)


#: The tables by name: functions of the checkout's folder.
CONTENTS: dict[str, Callable[[Path], str]] = {
    "cpu": lambda root: measured(_read(root / SOURCE)),
    "all": _all_tables,
    "forgetting": lambda root: short_table(_read(root / RESULTS / "forgetting.json")),
    "compatibility": lambda root: compatibility.summary(_read(root / RESULTS / "compatibility.json")),
    "compatibility-classes": lambda root: compatibility.every_class(_read(root / RESULTS / "compatibility.json")),
}


def measured(result: dict) -> str:
    """What `gci-kernels bench` measured: a sentence on how and where, and a Markdown table."""
    rows = [row for model in result["models"] for row in _model_rows(model)]
    rows += [_layer_row(layer) for layer in result["layers"]]
    return f"{_where(result)}\n\n{table(['', *COLUMNS.values()], rows)}"


def _model_rows(model: dict) -> list[list[str]]:
    dtype, train = model["dtype"], model["train"]
    rows = [_row(f"train step, tokens/s, {dtype}", medians(train["tokens_per_second"]), number)]
    for part in TIMED[1:]:
        if part in model:
            batch = model[part].get("batch", 1)
            together = "one sequence" if batch == 1 else f"{batch} sequences together"
            rates = medians(model[part]["tokens_per_second"])
            rows.append(_row(f"generation, {together}, tokens/s, {dtype}", rates, number))
    rows.append(_row(f"peak memory of a train step, {dtype}", train["peak_memory"], _size))
    rows.append(_row(f"kept for backward by the adapters, a token, {dtype}", train["saved_by_adapters"], _size))
    return rows


def _layer_row(layer: dict) -> list[str]:
    case = layer["case"]
    what = f"one {case['in_features']}x{case['out_features']} layer, {case['tokens']} tokens, {case['dtype']}"
    return _row(f"{what}: time over the frozen layer's", {"frozen": 1.0} | medians(layer["tax"]), number)


def _row(label: str, values: dict[str, float | None], form: Callable[[float], str]) -> list[str]:
    """A row of the table; a column without a value stays empty."""
    found = (values.get(name) for name in COLUMNS)
    return [label, *("" if value is None else form(value) for value in found)]


def _size(size: float) -> str:
    """A size in the unit with at most three digits before the decimal point."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if abs(size) < 1000:
            break
        size, unit = size / 1024, larger
    return f"{number(size)} {unit}"


def _where(result: dict) -> str:
    """What was measured, on which machine, with which versions and commit, and what was not measured."""
    settings, machine, versions = (result[name] for name in ("settings", "machine", "versions"))
    name = "SmolLM2-135M-Instruct" if settings["model"] == "smollm2" else settings["model"]
    steps = sorted({model["train"]["tokens"] for model in result["models"]})
    tokens = f", {' and '.join(map(str, steps))} tokens in a train step" if steps else ""
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores"
    return (
        f"{name} with {_adapter(result)}, adapters in {adapter_dtype(result)}{tokens}; {device}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}"
        f"{at_commit(result['commit'])}. Medians of {rounds(result)} interleaved rounds.{_left_out(result)}"
    )


def _adapter(result: dict) -> str:
    method = display_name(result["settings"]["method"])
    return f"{method}, {adapter_size(result['layers'][0]['case'])}" if result["layers"] else method


def _left_out(result: dict) -> str:
    """What was not measured, and what at a smaller size; older results do not record it."""
    products, notes = result.get("products", {}), []
    for dtype in result.get("left_out", ()):
        rates = [f"{name} {number(min(products[name].values()))}" for name in (dtype, "float32") if name in products]
        why = f" (GFLOP/s of PyTorch's product: {', '.join(rates)})" if rates else ""
        notes.append(f"{dtype} was left out: PyTorch multiplies it slowly on this processor{why}.")
    for each in result.get("shrunk", ()):
        notes.append(f"To end in time, {each['dtype']} {each['what']}: {each['used']} instead of {each['wanted']}.")
    return "".join(f" {note}" for note in notes)


def digest(root: Path) -> str:
    """The SHA-256 of the file that the plot shows."""
    return hashlib.sha256((root / SOURCE).read_bytes()).hexdigest()


def picture_digest(path: Path) -> str | None:
    """The digest in the metadata of a plot, or None."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(DIGEST)


def write_picture(root: Path) -> None:
    """Draws README's plot, with the digest of its numbers in the metadata."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path = root / PICTURE
    draw(_read(root / SOURCE), path)
    text = PngInfo()
    text.add_text(DIGEST, digest(root))
    with Image.open(path) as image:
        image.load()
    image.save(path, format="PNG", pnginfo=text, optimize=True)


def main(argv: list[str] | None = None) -> int:
    """Writes all tables and the plot."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="default: the checkout")
    root = parser.parse_args(argv).root
    for path, text in documents(root).items():
        path.write_text(text, encoding="utf-8")
        print(path)
    write_picture(root)
    print(root / PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
