"""The built pages as one PDF file, printed by a browser."""

import io
import shutil
from pathlib import Path

import publish

from diffecho_utils import DiffEchoError, assets, files

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def print_pages(html, out, pages=None):
    """Print the built pages (folder `html`) by a browser into one PDF file, with a bookmark for each.

    pages: names such as "notebooks/03_unconditional", by default all of _toc.yml in its order.
    Raises DiffEchoError where Chromium, Chrome, playwright or pypdf is missing, or a page.
    """
    try:
        from playwright.sync_api import sync_playwright
        from pypdf import PdfReader, PdfWriter
    except ModuleNotFoundError as error:
        raise DiffEchoError(
            f"{error.name}: not installed; run `pip install {error.name}`"
        ) from None
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        raise DiffEchoError(
            f"no browser among {', '.join(BROWSERS)}; `apt-get install chromium` brings one"
        )
    writer = PdfWriter()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        for name in pages or publish.toc(assets.root()):
            path = Path(html) / f"{name}.html"
            if not path.is_file():
                raise DiffEchoError(f"{path}: no such page; build the book first")
            page.goto(path.resolve().as_uri(), wait_until="load")
            page.evaluate("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
            page.wait_for_function("[...document.images].every(image => image.complete)")
            page.evaluate("window.MathJax?.startup?.promise")
            margins = {"top": "18mm", "bottom": "18mm", "left": "16mm", "right": "16mm"}
            printed = PdfReader(io.BytesIO(page.pdf(format="A4", margin=margins, scale=0.8)))
            writer.append(printed, outline_item=page.title().split(" — ")[0])
        browser.close()
    with files.draft(out) as beside:
        writer.write(beside)
    return Path(out)
