"""Run the sweep of README.md, and draw the table and the maps of its report as assets/report.png.

python scripts/report_picture.py [FOLDER]   # FOLDER: of a sweep that has finished

The page is that of `rnode report`, without its curves, samples and commands. Needs a Chromium.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ["reg.lambda_k=0,0.01,0.1", "reg.lambda_j=0,0.01,0.1"]
SWEEP += ["trainer.max_epochs=3", "model.hidden=8"]
WIDTH = 1100  # CSS pixels, of which README.md shows about 900
MAPS = 3  # the last figures of the page
HIDE = f"""
h1, h2, h2 ~ details, p, .grid:not(.wide + p + .grid), .grid img:not(:nth-last-child(-n+{MAPS}))
{{ display: none; }}
.grid {{ grid-template-columns: repeat({MAPS}, 1fr); margin-top: 1rem; }}
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if sys.argv[1:] else temporary).absolute()
        if not sys.argv[1:]:
            command = [sys.executable, "-m", "rnode", "train", "-m", *SWEEP]
            subprocess.run([*command, f"hydra.sweep.dir={folder}"], cwd=folder, check=True)
        shoot(folder / "report.html", ROOT / "assets" / "report.png")


def shoot(page: Path, picture: Path) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))))
    options = {"executable_path": chromium, "args": ["--no-sandbox"]}
    with sync_playwright() as started, started.chromium.launch(**options) as browser:
        size = {"width": WIDTH, "height": 400}
        tab = browser.new_page(viewport=size, device_scale_factor=1.5, offline=True)
        tab.goto(page.as_uri())
        tab.add_style_tag(content=HIDE)
        tab.screenshot(path=picture, full_page=True)


if __name__ == "__main__":
    main()
