"""MkDocs hooks: the pages show the pictures of assets/, which lies beside docs/."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ASSETS = Path(__file__).parent.parent / "assets"


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pictures to the site."""
    for path in sorted(ASSETS.glob("*.png")):
        files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links to a picture of the repository point to its copy in the site."""
    return markdown.replace("](../assets/", "](assets/")
