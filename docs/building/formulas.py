"""Formulas of the documentation: Sphinx's notation in docstrings becomes Markdown's, and LaTeX becomes MathML."""

from __future__ import annotations

import html
import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

INLINE = re.compile(r":math:`([^`]+)`")
DISPLAYED = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*)?)*)", re.MULTILINE)
# What the converter does not know, or browsers without a font for mathematics draw badly: as it knows it.
REWRITTEN = (
    (re.compile(r"\\(begin|end)\{aligned\}"), r"\\\1{split}"),
    (re.compile(r"\\arg\b"), r"\\mathrm{arg}\\,"),
    (re.compile(r"\\log\b"), r"\\log\\,"),
    (re.compile(r"\\[lr]Vert\b"), r"\\|"),
    (re.compile(r"\\[lr]vert\b"), "|"),
    (re.compile(r"(?<![A-Za-z\\])([A-Za-z])'"), r"{\1\\text{'}}"),  # a raised sign, once more raised
)
BAR = re.compile(r"<mo[^>]*>(&#x02016;|&#x0007C;)</mo>")  # of a norm, and as high as its surroundings are
IN_HTML = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


class MathDocstrings(griffe.Extension):
    """Rewrites the formulas in docstrings before they are taken for Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """A docstring with its formulas between dollars."""
    return INLINE.sub(lambda match: f"${match[1]}$", DISPLAYED.sub(_between_dollars, docstring))


def as_mathml(page: str) -> str:
    """A page's HTML with MathML in the place of the LaTeX that Markdown has found."""
    return IN_HTML.sub(_mathml, page)


def _between_dollars(match: re.Match[str]) -> str:
    latex = textwrap.dedent(match[2]).strip()
    if "&" in latex:
        latex = f"\\begin{{aligned}}\n{latex}\n\\end{{aligned}}"
    return textwrap.indent(f"\n$$\n{latex}\n$$\n\n", match[1])


def _mathml(match: re.Match[str]) -> str:
    latex = html.unescape(match[2]).strip()
    for pattern, known in REWRITTEN:
        latex = pattern.sub(known, latex)
    mathml = convert(latex, display="inline" if match[1] == "span" else "block")
    mathml = BAR.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', mathml)
    return mathml if match[1] == "span" else f'<div class="formula">{mathml}</div>'
