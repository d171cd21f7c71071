"""What the site needs beyond Markdown: files from outside of docs, and docstrings' references."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+)([^)#]+)\)")
_RESULTS = "bench/results/"
_SUFFIXES = (".png", ".md")  # of the results that pages show
_ROLE = re.compile(r":(?:func|class|data|meth|mod|attr):`\.?([^`]+)`")


def on_files(files: Files, config: Any) -> Files:
    """Pictures and reports of bench/results become part of the site, and the colours of code."""
    root = Path(config.config_file_path).parent
    files.append(File.generated(config, "pygments.css", content=HtmlFormatter().get_style_defs(".highlight")))
    for path in sorted((root / _RESULTS).iterdir()):
        if path.suffix in _SUFFIXES:
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files outside of docs, which a checkout can follow: to those in the site, or to no link but a name."""
    up = "../" * page.file.src_uri.count("/")

    def link(found: re.Match) -> str:
        picture, text, steps, target = found.groups()
        if len(steps) <= len(up):
            return found[0]  # to another page
        if target.startswith(_RESULTS) and target.endswith(_SUFFIXES):
            return f"{picture}[{text}]({up}results/{target.removeprefix(_RESULTS)})"
        return f"`{target}`"

    return _LINK.sub(link, markdown)


class Roles(griffe.Extension):
    """Docstrings refer to one another as Sphinx does, :func:`name`: here the name is shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
