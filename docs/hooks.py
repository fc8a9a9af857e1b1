"""MkDocs hooks: pages show pictures of assets/ and link to records, which both lie beside docs/."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
BESIDE = {"assets": "*.*", "benchmarks/results": "*.json"}  # folders of the repository


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pictures and the records to the site."""
    for folder, pattern in BESIDE.items():
        for path in sorted((ROOT / folder).glob(pattern)):
            source = str(path)
            files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=source))


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links to these files point to their copies in the site."""
    for folder in BESIDE:
        markdown = markdown.replace(f"](../{folder}/", f"]({folder}/")
    return markdown
