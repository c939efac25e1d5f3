"""What mkdocs does not do by itself: pages from outside of docs/, notebooks, all messages."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from messages import all_messages  # noqa: E402
from notebooks import as_markdown  # noqa: E402
from reference import modules  # noqa: E402

# Pages of the repository that are pages of the site under the same path.
OUTSIDE = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "experiments/*/README.md"]
_LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"(^```[^`]*?^```$|^(?: {4}[^\n]*\n)+)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of the API to the navigation, and what nobody has put there under "More"."""
    api = {"API": ["api/index.md", *({m.name: m.page} for m in modules(ROOT))]}
    docs = ROOT / "docs"
    pages = [path.relative_to(docs).as_posix() for path in sorted(docs.glob("*.md"))]
    pages += [f"notebooks/{path.stem}.md" for path in sorted(docs.glob("notebooks/*.ipynb"))]
    pages += [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("experiments/*/README.md"))]
    listed = set(_pages(config.nav))
    more = [page for page in pages if page not in listed]
    config.nav = [*config.nav, api, *([{"More": more}] if more else [])]
    return config


def _pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    inner = entry if isinstance(entry, list) else entry.values()
    return [page for each in inner for page in _pages(each)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside, the pictures they show, and what is generated."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        _add(files, config, path.relative_to(ROOT).as_posix(), path)
        for picture in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            source = (path.parent / picture).resolve()
            if source.exists():  # else mkdocs says which page shows a picture that is not there
                _add(files, config, source.relative_to(ROOT).as_posix(), source)
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        text = as_markdown(notebook)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
    for module in modules(ROOT):
        files.append(File.generated(config, module.page, content=module.markdown()))
    files.append(File.generated(config, "messages.md", content=all_messages(ROOT)))
    return files


def _add(files: Files, config: MkDocsConfig, name: str, path: Path) -> None:
    if name not in files.src_uris:
        files.append(File.generated(config, name, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that are right in the repository into those of the site."""
    name = page.file.src_uri
    inside = (ROOT / "docs" / name).exists() or page.file.content_string.startswith("<!-- notebook")
    here = posixpath.dirname(f"docs/{name}" if inside else name)

    def moved(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match.group(0)
        path, hash_, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(here, path)).removeprefix("docs/")
        target = re.sub(r"^(notebooks/\w+)\.ipynb$", r"\1.md", target)
        for candidate in (target, f"{target}/README.md"):
            if candidate in files.src_uris:
                link = posixpath.relpath(candidate, posixpath.dirname(name) or ".")
                return f"{mark}[{text}]({link}{hash_}{anchor})"
        # Code, or a folder of it: it is in the repository and not on the site.
        return text if (ROOT / target).exists() else match.group(0)

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)
