"""Run `rnode train` in a temporary folder, and draw what it prints as assets/terminal.svg.

python scripts/screenshot.py [KEY=VALUE ...]
"""

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    arguments = ["train", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rnode", *arguments]
        run = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        lines = re.sub(rf"{re.escape(folder)}/", "", run.stdout).splitlines()
    console = Console(record=True, width=max(map(len, lines)) + 1, file=io.StringIO())
    for line in (f"$ rnode {' '.join(arguments)}", *lines):
        console.print(Text(line))
    picture = console.export_svg(title="rnode")
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)  # they need a network
    (ROOT / "assets" / "terminal.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
