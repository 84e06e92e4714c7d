"""mkdocs' hook: what pages of docs/ link to outside of it (sources, examples, CONTRIBUTING.md) becomes pages, too.

A link that is right in the repository is right in the site, wherever that lies and without a network: one to
../examples/fsdp2.py leads to a page with the listing, one to a folder to its README or index. Links that lead nowhere
are left as they are, for mkdocs to complain of.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=[)\s])")
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.M | re.S)
PLACE = "source"  # where pages of what lies outside of docs/ are
LANGUAGES = {".py": "python", ".h": "cpp", ".cuh": "cpp", ".cu": "cpp", ".cpp": "cpp", ".toml": "toml", ".sh": "bash"}
LARGEST = 200_000  # bytes of a listing
# In the navigation, as source/...
IN_NAV = ("CHANGELOG.md", "CONTRIBUTING.md", "bench/README.md", "examples/README.md", "examples/decisions.ipynb")


def repository_path(uri: str) -> str:
    """Where the page ``uri`` of the site comes from."""
    if uri.startswith(f"{PLACE}/"):
        path = uri.removeprefix(f"{PLACE}/")
        return path if (ROOT / path).is_file() else path.removesuffix(".md")
    return f"docs/{uri}"


def page_uri(path: str) -> str | None:
    """The page of the site for a path in the repository; None if there is no such file."""
    target = ROOT / path
    if target.is_dir():
        inside = [name for name in ("README.md", "index.md") if (target / name).is_file()]
        if not inside:
            return None
        path, target = posixpath.join(path, inside[0]), target / inside[0]
    if not target.is_file():
        return None
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    listing = target.suffix == ".ipynb" or target.suffix != ".md" and is_text(target)
    return f"{PLACE}/{path}{'.md' if listing else ''}"


def is_text(path: Path) -> bool:
    content = path.read_bytes()
    return len(content) <= LARGEST and b"\0" not in content


def targets(markdown: str, origin: str) -> list[tuple[re.Match[str], str]]:
    """The links of a page that comes from ``origin`` in the repository: their matches, and the page each leads to."""
    code = [match.span() for match in CODE.finditer(markdown)]
    found = []
    for match in LINK.finditer(markdown):
        if any(begin <= match.start() < end for begin, end in code):
            continue
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))
        uri = None if path.startswith("..") else page_uri(path)
        if uri is not None:
            found.append((match, uri))
    return found


def rewritten(markdown: str, origin: str, uri: str) -> str:
    """The page with its links as the site has them."""
    for match, target in reversed(targets(markdown, origin)):
        relative = posixpath.relpath(target, posixpath.dirname(uri) or ".")
        markdown = f"{markdown[: match.start(1)]}{relative}{markdown[match.end(1) :]}"
    return markdown


def content_of(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        return notebook(json.loads(text))
    fence = "`" * 5
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"# {path}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"


def notebook(content) -> str:
    """A notebook as a page: its text, its code, and what it printed and drew."""
    parts = []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            if "image/png" in output.get("data", {}):
                parts.append(f"![](data:image/png;base64,{''.join(output['data']['image/png']).strip()})")
    return "\n\n".join(parts) + "\n"


def on_files(files, config):
    """Adds a page for everything outside of docs/ that a page links to, and for what those link to."""
    pages = files.documentation_pages()
    waiting = [(repository_path(page.src_uri), Path(page.abs_src_path).read_text("utf-8")) for page in pages]
    waiting.append(("docs/", "".join(f"[in the navigation](../{path})" for path in IN_NAV)))
    while waiting:
        origin, markdown = waiting.pop()
        for _, target in targets(markdown, origin):
            if not target.startswith(f"{PLACE}/") or files.get_file_from_path(target) is not None:
                continue
            path = repository_path(target)
            if target.endswith(".md"):
                text = content_of(path)
                file = File.generated(config, target, content=text, inclusion=InclusionLevel.NOT_IN_NAV)
                waiting.append((path, text if path.endswith(".md") else ""))
            else:
                source = os.fspath(ROOT / path)
                file = File.generated(config, target, abs_src_path=source, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(file)
    return files


def on_page_markdown(markdown, page, config, files):
    return rewritten(markdown, repository_path(page.file.src_uri), page.file.src_uri)
