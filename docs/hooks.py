"""Pages of the site that are made of other files of the project; see mkdocs.yml.

The tutorial is a notebook; a link to a file outside ``docs`` leads to a page that lists this file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# "[text](../configs/x.yaml)" or "[text](../configs/x.yaml#part)".
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "tutorial.md": notebook_to_markdown(ROOT / "docs" / "tutorial.ipynb"),
        "contributing.md": _from_root("CONTRIBUTING.md"),
        "changelog.md": _from_root("CHANGELOG.md"),
    }
    texts = [file.content_string for file in files.documentation_pages()] + list(pages.values())
    for path in {found[1] for text in texts for found in OUTSIDE.finditer(text)}:
        pages[_listing(path)] = list_file(path)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to files outside ``docs``, and to the notebook, to their pages."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    markdown = OUTSIDE.sub(lambda found: f"]({_listing(found[1])})", markdown)
    return markdown.replace("](tutorial.ipynb)", "](tutorial.md)")


def notebook_to_markdown(path: Path) -> str:
    """The cells of a notebook with their outputs; figures are embedded."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in _cell(cell))


def list_file(path: str) -> str:
    """A page with the text of a file of the project."""
    text = (ROOT / path).read_text(encoding="utf-8").rstrip()
    language = PurePosixPath(path).suffix.lstrip(".")
    return f"# {path}\n\n````{language}\n{text}\n````\n"


def _listing(path: str) -> str:
    return f"source/{path}.md"


def _from_root(name: str) -> str:
    """A page of the project's root, whose links are relative to it."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(
        r"\]\((?!https?:|#)(docs/)?([^)]+)\)",
        lambda link: f"]({link[2]})" if link[1] else f"](../{link[2]})",
        text,
    )


def _cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [f"```python\n{source}\n```", *map(_output, cell["outputs"])]


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![Figure](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = output.get("text") or data.get("text/plain", "")
    return f"```text\n{''.join(text).rstrip()}\n```"
