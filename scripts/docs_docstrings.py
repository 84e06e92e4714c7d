"""An extension of griffe, which reads docstrings for the site: reStructuredText's roles and literal blocks, which the
docstrings have for help() and editors, become Markdown."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")
LITERAL = re.compile(r"::$", re.M)


def markdown(text: str) -> str:
    return LITERAL.sub(":", ROLE.sub(r"`\1`", text))


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
