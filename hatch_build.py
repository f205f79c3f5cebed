"""The description and the URLs of the package's metadata: the README with links that work where it is copied to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def absolute_links(markdown: str, repository: str) -> str:
    """
    Make the relative links and images of a page of the repository's root absolute.

    Args:
        markdown (`str`): The page.
        repository (`str`): URL of the repository, without a slash at its end.
    """

    def absolute(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if target.startswith(("http://", "https://", "#", "mailto:")):
            return match[0]
        kind = "raw" if mark else "blob"  # an image itself, not the page that shows it
        return f"{mark}[{text}]({repository}/{kind}/HEAD/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, markdown)


class ReadmeAndUrls(MetadataHookInterface):
    """Fills in what `pyproject.toml` calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the README and the URLs; the address of the repository is set in `pyproject.toml`."""
        repository = self.config["repository"].rstrip("/")
        text = absolute_links(Path(self.root, "README.md").read_text(encoding="utf-8"), repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = {
            "Repository": repository,
            "Documentation": f"{repository}/blob/HEAD/docs/index.md",
            "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
            "Issues": f"{repository}/issues",
            "Paper": "https://huggingface.co/papers/2410.06084",
        }
