"""An extension of griffe, which reads docstrings for the site: reStructuredText's roles and literal blocks, which the
docstrings have for help() and editors, become Markdown."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")
LITERAL = re.compile(r"::$", re.M)


# "horizon, unroll: steps of ..." in Args: one entry for several, its first line and those that go on.
SEVERAL = re.compile(r"^( +)(\w+)((?:, \w+)+): (.*(?:\n\1 +.*)*)", re.M)
ARGS = re.compile(r"^Args:\n(?:(?: +.*)?\n?)*", re.M)


def markdown(text: str) -> str:
    """The docstring with roles as code, literal blocks as code blocks, and an entry for every argument."""
    text = LITERAL.sub(":", ROLE.sub(r"`\1`", text))
    return ARGS.sub(lambda found: SEVERAL.sub(one_by_one, found[0]), text)


def one_by_one(found: re.Match[str]) -> str:
    indent, first, others, about = found.groups()
    return f"{indent}{first}: {about}" + "".join(
        f"\n{indent}{name}: see `{first}`." for name in others.split(", ") if name
    )


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
