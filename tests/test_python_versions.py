"""Nothing that Python 3.10 lacks: its syntax, and its standard library."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    *ROOT.glob("*.py"),
    *(path for top in ("gci_kernels", "bench", "tests") for path in (ROOT / top).rglob("*.py")),
]

# What Python 3.11 to 3.13 brought, by module; "" are the builtins. None: the module itself is new.
NEWER: dict[str, set[str] | None] = {
    "": {"ExceptionGroup", "BaseExceptionGroup", "PythonFinalizationError"},
    "asyncio": {"TaskGroup", "timeout", "timeout_at", "Runner", "Barrier", "QueueShutDown"},
    "collections.abc": {"Buffer"},
    "contextlib": {"chdir"},
    "copy": {"replace"},
    "datetime": {"UTC"},
    "dbm.sqlite3": None,
    "enum": {"StrEnum", "ReprEnum", "EnumCheck", "FlagBoundary", "verify", "member", "nonmember", "property",
             "global_enum", "global_str", "show_flag_values", "CONFORM", "CONTINUOUS", "NAMED_FLAGS", "UNIQUE",
             "EnumType"},
    "functools": {"Placeholder"},
    "hashlib": {"file_digest"},
    "importlib.resources.abc": None,
    "inspect": {"getmembers_static", "ismethodwrapper", "markcoroutinefunction", "getasyncgenstate", "BufferFlags"},
    "itertools": {"batched"},
    "locale": {"getencoding"},
    "logging": {"getLevelNamesMapping", "getHandlerByName", "getHandlerNames"},
    "math": {"cbrt", "exp2", "sumprod", "fma"},
    "operator": {"call", "is_none", "is_not_none"},
    "os": {"process_cpu_count", "listdrives", "unshare", "setns"},
    "pathlib": {"UnsupportedOperation"},
    "queue": {"ShutDown"},
    "random": {"binomialvariate"},
    "re": {"NOFLAG", "PatternError"},
    "sys": {"exception", "monitoring", "activate_stack_trampoline", "_is_gil_enabled"},
    "tomllib": None,
    "types": {"get_original_bases", "CapsuleType"},
    "typing": {"Self", "Never", "LiteralString", "Required", "NotRequired", "Unpack", "TypeVarTuple", "assert_never",
               "assert_type", "reveal_type", "dataclass_transform", "get_overloads", "clear_overloads", "override",
               "TypeAliasType", "NoDefault", "TypeIs", "ReadOnly", "get_protocol_members", "is_protocol"},
    "unittest": {"enterModuleContext"},
    "warnings": {"deprecated"},
    "wsgiref.types": None,
}  # fmt: skip
# Methods whose name nothing older has.
NEWER_METHODS = {"add_note", "is_junction", "full_match", "with_segments", "from_uri", "enterContext"}


def newer(tree: ast.AST) -> set[str]:
    """What a module uses that :data:`NEWER` lists."""
    found, names = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name
                if NEWER.get(alias.name, ()) is None:
                    found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            new = NEWER.get(node.module, ())
            found |= {f"{node.module}.{alias.name}" for alias in node.names if new is None or alias.name in new}
            found |= {alias.name for alias in node.names if NEWER.get(f"{node.module}.{alias.name}", ()) is None}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in NEWER[""]:
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            module = names.get(ast.unparse(node.value))
            if node.attr in NEWER_METHODS or node.attr in (NEWER.get(module) or ()):
                found.add(ast.unparse(node))
    return found


@pytest.mark.smoke
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_are_for_python_3_10(path):
    source = path.read_text("utf-8")
    assert newer(ast.parse(source, feature_version=(3, 10))) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import tomllib", "from typing import Self", "import typing as t\nx: t.Self", "from enum import StrEnum as S",
        "import datetime\ndatetime.UTC", "raise ExceptionGroup('', [])", "error.add_note('')", "import wsgiref.types",
        "from wsgiref import types", "import itertools\nitertools.batched(x, 2)", "from importlib.resources import abc",
    ],
)  # fmt: skip
def test_what_is_newer_is_found(source):
    assert newer(ast.parse(source)) != set()


@pytest.mark.parametrize("source", ["def f[T](x: T): ...", "type X = int", "try: ...\nexcept* ValueError: ..."])
def test_newer_syntax_is_found(source):
    with pytest.raises(SyntaxError):
        ast.parse(source, feature_version=(3, 10))
