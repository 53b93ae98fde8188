"""The built pages as one PDF file, printed by a browser."""

import io
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright
from pypdf import PdfWriter
from sphinx_external_toc.parsing import parse_toc_yaml

from diffecho_utils import DiffEchoError, assets, files

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def print_pages(html, out, pages=None):
    """Print the built pages (folder `html`) into one PDF file `out`, with a bookmark for each.

    pages: names such as "notebooks/03_unconditional", by default all of _toc.yml in its order.
    """
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise DiffEchoError(f"no browser among {', '.join(BROWSERS)}: `apt-get install chromium`")
    margin = {"top": "18mm", "bottom": "18mm", "left": "16mm", "right": "16mm"}
    writer = PdfWriter()
    with sync_playwright() as play:
        page = play.chromium.launch(executable_path=path, args=["--no-sandbox"]).new_page()
        for name in pages or parse_toc_yaml(assets.root() / "_toc.yml"):
            page.goto((Path(html) / f"{name}.html").resolve().as_uri())
            page.evaluate("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
            page.wait_for_function("[...document.images].every(image => image.complete)")
            page.evaluate("window.MathJax?.startup?.promise")
            printed = io.BytesIO(page.pdf(format="A4", margin=margin, scale=0.8))
            writer.append(printed, outline_item=page.title().split(" — ")[0])
    with files.draft(out) as beside:
        writer.write(beside)
    return Path(out)
