"""
The site shows the repository as it stands: a page keeps its path, so a link that works on the forge works on the site.

MkDocs publishes one folder (`docs_dir`). This hook replaces it by the Markdown files of the whole repository, and what
they link to: plots, YAML files, scripts. MkDocs then checks every link and anchor, since the build is strict.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/**/*.md", "recipes/**/*.md", "results/**/*.md", "benchmarks/**/*.md")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


def pages() -> list[Path]:
    """All Markdown files of the repository, sorted."""
    return sorted(path for pattern in PAGES for path in ROOT.glob(pattern))


def linked_files(page: Path) -> set[Path]:
    """Files of the repository that a page links to and that are no pages themselves."""
    targets = (page.parent / target for target in LINK.findall(page.read_text()) if "://" not in target)
    return {path for target in targets if (path := target.resolve()).is_file() and path.suffix != ".md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Keep what the theme brings, and put the repository's pages in place of the files of `docs_dir`."""
    published = Files([file for file in files if file.src_dir != config.docs_dir])
    ours = pages()
    styles = [path for style in config.extra_css if (path := ROOT / style).is_file()]
    for path in sorted({*ours, *styles, *(file for page in ours for file in linked_files(page))}):
        source = path.relative_to(ROOT).as_posix()
        published.append(File(source, str(ROOT), config.site_dir, config.use_directory_urls))
    return published
