"""Fill the tables of README.md and docs/ from the records in benchmarks/results.

python scripts/render_docs.py           # writes the tables
python scripts/render_docs.py --check   # fails if a page differs from its records

A page holds a pair of markers for each table; `columns` renames by NAME=HEADER, and `rows` keeps
the rows in which a regular expression is found. The rows of several records are joined.

<!-- record: NAME… columns=A|B=HEADER|C rows=REGEX -->
<!-- end -->
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks/results"
MARKERS = re.compile(
    r"(?P<begin><!-- record: (?P<names>[\w ]+?)"
    r"(?: columns=(?P<columns>.+?))?(?: rows=(?P<rows>.+?))? -->\n)"
    r".*?(?P<end><!-- end -->)",
    re.DOTALL,
)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(page: Path) -> str:
    """Return the text of a page with its tables filled."""
    folder = "benchmarks/results" if page.parent == ROOT else "../benchmarks/results"

    def fill(match: re.Match) -> str:
        names = match["names"].split()
        lines = table(names, match["columns"], match["rows"])
        links = ", ".join(f"[record]({folder}/{name}.json)" for name in names)
        return "\n".join([match["begin"], *lines, "", f"<small>{links}</small>", match["end"]])

    return MARKERS.sub(fill, page.read_text(encoding="utf-8"))


def table(names: list[str], columns: str | None, pattern: str | None) -> list[str]:
    """Return the lines of a table of the records `names`."""
    rows = [row for name in names for row in read(name)["rows"]]
    known = list(dict.fromkeys(column for row in rows for column in row))
    headers = {}
    for column in columns.split("|") if columns else known:
        name, _, header = (column, "", "") if column in known else column.partition("=")
        headers[name] = header or name
    if unknown := headers.keys() - known:
        raise KeyError(f"{' '.join(names)}: no row has {', '.join(sorted(unknown))}")
    kept = [row for row in rows if re.search(pattern or "", " | ".join(row.values()))]
    cells = [headers.values(), *([row.get(column, "") for column in headers] for row in kept)]
    lines = [f"|{'|'.join(line)}|" for line in cells]
    return [lines[0], "|---" * len(headers) + "|", *lines[1:]]


def read(name: str) -> dict:
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def main(arguments: list[str]) -> int:
    stale = [page for page in pages() if render(page) != page.read_text(encoding="utf-8")]
    for page in stale:
        if "--check" not in arguments:
            page.write_text(render(page), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {'stale' if '--check' in arguments else 'rendered'}")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
