"""Takes the pictures of docs/pictures: reports in a browser, light and dark.

tda train experiment=digits
tda attribute runs/digits estimator=tracin
tda attribute runs/digits estimator=source
python docs/_site/pictures.py runs/digits

Data are scikit-learn's digits and the sentences of docs/notebooks/text.ipynb, which anybody may
pass on. Needs playwright, pillow and a Chromium.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tda_lightning.cli import main as tda
from tda_lightning.report import Rendered, write_report

DOCS = Path(__file__).parents[1]
SIZE = {"width": 1080, "height": 640}
COLOURS = 64  # keeps a picture at about 40 kB


def digits_report(run: Path) -> Path:
    """The report on TracIn's scores, compared with SOURCE's."""
    page, scores = Path(tempfile.mkdtemp()) / "digits.html", run / "scores"
    status = tda(
        ["report", str(scores / "tracin.h5"), f"compare=[{scores / 'source.h5'}]", f"output={page}"]
    )
    if status:
        sys.exit(status)
    return page


def text_report() -> Path:
    """The report on the run of the notebook on text."""
    notebook = json.loads((DOCS / "notebooks" / "text.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    names: dict = {}
    os.chdir(tempfile.mkdtemp())
    for cell in cells:
        exec(compile(cell, "text.ipynb", "exec"), names)
    sentences = {"train": names["sentences"], "query": ["the capital of spain is madrid"]}

    def render(split: str, index: int) -> Rendered:
        words = sentences[split][index].split()
        # The first word is no term of the loss: nothing predicts it.
        return Rendered(pieces=[(f"{w} ", n - 1 if n else None) for n, w in enumerate(words)])

    data = {"train": sentences["train"], "query": sentences["query"], "render": render}
    return write_report(names["scores"], "text.html", **data).resolve()


def main() -> None:
    pages = [(digits_report(Path(sys.argv[1]).resolve()), "query", "#query-56", 0)]
    pages += [(pages[0][0], name, f"#{name}", 0) for name in ("triage", "groups", "compare")]
    pages.append((text_report(), "text", "#query-0", 640))
    (DOCS / "pictures").mkdir(exist_ok=True)
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for path, name, place, down in pages:
                page = chromium.new_page(viewport=SIZE, color_scheme=scheme)
                page.goto(path.as_uri() + place)
                page.evaluate(f"scrollTo(0, {down})")
                picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
                small = picture.quantize(COLOURS, dither=Image.Dither.NONE)
                small.save(DOCS / "pictures" / f"report-{name}-{scheme}.png", optimize=True)
                page.close()
        chromium.close()


if __name__ == "__main__":
    main()
