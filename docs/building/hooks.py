"""What mkdocs takes from the repository beside docs/: pages made of the README, settings, commands and code.

Links from a page to a file outside of docs/ lead to a page that shows the file; a link whose text is the name of a
class or a function, such as [`DeFlow.losses`](../src/deflow/agents/deflow.py), to its line.
"""

from __future__ import annotations

import ast
import posixpath
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).parent)]

import formulas  # noqa: E402
import reference  # noqa: E402

log = get_plugin_logger("docs/building")

README, START = "README.md", "index.md"  # which shows it
SOURCE = "source/"  # where files of the repository are shown
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)(?=[)#])")
NAMED = re.compile(rf'(<a href="[^"]*?{SOURCE}([^"]+\.py)\.html)("><code>([\w.]+)</code></a>)')
LANGUAGES = {".py": "python", ".yaml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and a page for every file that some page links to."""
    pages = {START: (ROOT / README).read_text(), **reference.pages()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    shown = {path for file in files.documentation_pages() for path in _shown(file)}
    for path in sorted(shown):
        files.append(File.generated(config, _page_of(path), content=_source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to the site's pages."""
    uri = page.file.src_uri
    if uri.startswith(SOURCE):
        return markdown

    def of_site(match: re.Match[str]) -> str:
        return posixpath.relpath(_page_of(_in_repository(uri, match[1])), posixpath.dirname(uri) or ".")

    return LINK.sub(of_site, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which needs no script, and links to a name with its line."""
    return NAMED.sub(_with_line, formulas.as_mathml(html))


def _in_repository(uri: str, link: str) -> str:
    """The path of what a page links to."""
    folder = "" if uri == START else posixpath.join("docs", posixpath.dirname(uri))
    return posixpath.normpath(posixpath.join(folder, link))


def _shown(file: File) -> Iterator[str]:
    """The files outside of docs/ to which a page links."""
    for match in LINK.finditer(file.content_string):
        path = _in_repository(file.src_uri, match[1])
        if _page_of(path).startswith(SOURCE) and (ROOT / path).exists():
            yield path


def _page_of(path: str) -> str:
    """The page of the site that shows a file of the repository."""
    if path == README:
        return START
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{SOURCE}{path}.md"


def _source_page(path: str) -> str:
    found = ROOT / path
    if found.is_dir():
        names = "\n".join(f"- `{one.name}`" for one in sorted(found.iterdir()) if not one.name.startswith((".", "_")))
        body = f"A folder:\n\n{names}"
    else:
        language = LANGUAGES.get(found.suffix, "text")
        body = f'~~~~~ {{ .{language} linenums="1" }}\n{found.read_text().rstrip()}\n~~~~~'
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n{body}\n"


def _with_line(match: re.Match[str]) -> str:
    start, path, end, name = match.groups()
    line = _lines(path).get(name)
    if line is None:
        log.warning(f"{path} has no '{name}'")
    return f"{start}#__codelineno-0-{line}{end}"


@cache
def _lines(path: str) -> dict[str, int]:
    """The line of each class, method and function of a file, by its qualified name."""
    return dict(_definitions(ast.parse((ROOT / path).read_text()), ""))


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield f"{prefix}{child.name}", child.lineno
            yield from _definitions(child, f"{prefix}{child.name}.")
