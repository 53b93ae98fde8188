"""The built pages in a real browser: what loads, what is seen, where links and buttons lead."""

import gzip
import re
import shutil
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import numpy as np
import pytest
import yaml
from PIL import Image

from diffecho_utils import assets

sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pypdf = pytest.importorskip("pypdf", reason="pypdf is not installed")
import pdf  # noqa: E402, needs them

MEGABYTES = 2.0  # of a page with all that it loads, text compressed as servers of static pages do
SECONDS = 2.0  # until a page is there, from a server on this machine


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, pdf.BROWSERS)), None)
    if path is None:
        pytest.skip(
            f"no browser among {', '.join(pdf.BROWSERS)}; install one to test the pages in it"
        )
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(built, serve):
    """Address of a server of the built pages."""
    with serve(built / "html") as address:
        yield f"{address}/"


@pytest.fixture
def page(browser):
    with browser.new_page() as page:
        yield page


class Visit:
    """What happened while a page was loaded, and what is on it."""

    def __init__(self, page, address):
        self.errors, self.failed, self.images, self.bytes = [], [], {}, 0
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("requestfailed", lambda request: self.failed.append(request.url))
        page.on("response", self.note)
        page.goto(address, wait_until="networkidle")
        page.evaluate("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
        page.wait_for_load_state("networkidle")
        page.wait_for_function("[...document.images].every(image => image.complete)")
        found = page.evaluate(
            """({
            ready: performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd,
            text: document.querySelector('main').innerText,
            links: [...document.querySelectorAll('a[href]')].map(a => a.href),
            anchors: [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name),
            terms: [...document.querySelectorAll('.bd-article a.reference:has(.std-term)')].map(a =>
                [a.hash, a.title, a.closest('.cell') !== null]),
            pictures: [...document.querySelectorAll('.bd-article img')].map(i => [i.currentSrc, i.alt,
                i.naturalWidth, i.checkVisibility() || i.closest('details') !== null])})"""
        )
        vars(self).update(found)

    def note(self, response):
        if response.status >= 400:
            self.failed.append(f"{response.status} {response.url}")
            return
        body = response.body() if response.status == 200 else b""
        kind = response.headers.get("content-type", "")
        text = re.search("text|javascript|json|svg", kind)
        self.bytes += len(gzip.compress(body) if text else body)
        if kind.startswith("image/"):
            self.images[response.url] = body


@pytest.fixture(scope="module")
def visits(browser, site, built):
    """{page: its visit}, of all pages of the table of contents."""
    names = [p.relative_to(built / "html").as_posix() for p in (built / "html").rglob("*.html")]
    found = {}
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        for name in sorted(names):
            if name != "index.html" and not name.startswith("_"):
                with context.new_page() as page:
                    found[name] = Visit(page, site + name)
    return found


def test_every_page_loads_without_error_from_this_server_alone(visits, site):
    listed = str(yaml.safe_load((assets.root() / "_toc.yml").read_text()))
    assert len(visits) > 20
    for name, visit in visits.items():
        assert not visit.errors and not visit.failed, (name, visit.errors, visit.failed)
        assert "Traceback (most recent call last)" not in visit.text, name
        assert name.removesuffix(".html") in listed or name in ("genindex.html", "search.html")
        assert all(url.startswith((site, "data:")) for url in visit.images), name


def test_every_picture_is_there_and_not_blank(visits):
    shown = 0
    for name, visit in visits.items():
        for source, alt, width, visible in visit.pictures:
            assert width > 0 and visible and alt, (name, source, alt)
            if source in visit.images and not source.endswith(".svg"):
                picture = np.asarray(Image.open(BytesIO(visit.images[source])).convert("L"))
                assert picture.std() > 1, (name, alt)
                shown += 1
    assert shown > 100


FIRST_RESULT = """kinds => Math.min(...[...document.querySelectorAll('.bd-article .cell_output')]
    .flatMap(output => [...output.querySelectorAll(kinds)])
    .filter(result => result.checkVisibility() && result.clientWidth > 100)
    .map(result => result.getBoundingClientRect().top + scrollY))"""
# Other chapters than these begin with a picture
FIRST_KINDS = {"09_segmentation": "p", "10_classification": "p", "11_claims": "table"}


@pytest.mark.parametrize("width", [1280, 390])
def test_a_chapter_begins_with_its_result(browser, site, visits, width):
    """A picture, the table of verdicts, or sentences that say what was found: on the first screen."""
    tops = {}
    with browser.new_context(viewport={"width": width, "height": 900}) as context:
        for name in visits:
            if name.startswith("notebooks/"):
                kinds = FIRST_KINDS.get(Path(name).stem, "img")
                with context.new_page() as page:
                    page.goto(site + name)
                    tops[name] = page.evaluate(FIRST_RESULT, kinds)
    late = {name: top for name, top in tops.items() if top > 900}
    assert len(tops) >= 11 and not late, late


def test_links_within_the_book_resolve_and_buttons_open_the_page_s_notebook(visits, site):
    for name, visit in visits.items():
        for link in visit.links:
            target, anchor = urldefrag(link.removeprefix(site))
            target = urlsplit(target).path
            if link.startswith(site) and target.endswith(".html") and target != "index.html":
                assert target in visits, (name, link)
                assert not anchor or unquote(anchor) in visits[target].anchors, (name, link)
    chapters = [name for name in visits if name.startswith("notebooks/")]
    assert len(chapters) >= 11
    for name in chapters:
        notebook = name.replace(".html", ".ipynb")
        launch = [link for link in visits[name].links if "colab." in link or "mybinder." in link]
        assert len(launch) == 2 and all(unquote(link).endswith(notebook) for link in launch), launch


def test_pages_are_light_and_quick(visits, browser, site):
    heavy = {n: f"{v.bytes / 1e6:.2f} MB" for n, v in visits.items() if v.bytes > 1e6 * MEGABYTES}
    assert not heavy
    slow = {name: visit.ready for name, visit in visits.items() if visit.ready > 1e3 * SECONDS}
    for name in slow:  # once more, should the machine have been busy
        with browser.new_page() as page:
            slow[name] = min(Visit(page, site + name).ready for _ in range(3))
    assert not {name: ready for name, ready in slow.items() if ready > 1e3 * SECONDS}


def test_search_finds_and_terms_show_their_definition(page, site):
    page.goto(site + "search.html?q=ControlNet")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(a => a.href)")
    assert any("05_text_and_segmentation_guided" in link for link in found)
    page.goto(site + "book/intro.html")
    title = page.get_attribute("a.reference:has(.std-term)", "title")
    assert title.startswith("What the encoder makes of an image")


def test_chapters_link_the_first_use_of_each_term(visits):
    for name in (name for name in visits if name.startswith("notebooks/")):
        anchors = [anchor for anchor, _, _ in visits[name].terms]
        assert len(anchors) >= 5 and len(set(anchors)) == len(anchors), name
        assert all(title and not in_cell for _, title, in_cell in visits[name].terms), name


def luminance(colour):
    """Relative luminance of "rgb(r, g, b)" (WCAG 2.1)."""
    parts = np.array([float(x) for x in colour.strip("rgba()").split(",")[:3]]) / 255
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_dark_theme_switches_and_is_legible(page, site):
    page.goto(site + "notebooks/03_unconditional.html")
    shades = {}
    for _ in range(4):
        theme = page.evaluate("document.documentElement.dataset.theme")
        colours = page.evaluate(
            "[getComputedStyle(document.querySelector('main p')).color,"
            " getComputedStyle(document.body).backgroundColor]"
        )
        shades[theme] = [luminance(colour) for colour in colours]
        page.locator(".theme-switch-button").first.click()
    assert set(shades) == {"light", "dark"}
    assert shades["dark"][0] > shades["dark"][1] and shades["light"][0] < shades["light"][1]
    for pair in shades.values():
        assert (max(pair) + 0.05) / (min(pair) + 0.05) > 4.5


def test_no_table_cuts_a_sentence_short(built):
    for page in (built / "html" / "notebooks").glob("*.html"):
        assert not re.findall(r"<td>[^<]+\.\.\.</td>", page.read_text()), page.name


def test_narrow_screen_has_no_sideways_scroll(browser, site, visits):
    wide = {}
    beyond = "document.scrollingElement.scrollWidth - document.documentElement.clientWidth"
    with browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True) as context:
        for name in visits:
            with context.new_page() as page:
                page.goto(site + name)
                wide[name] = page.evaluate(beyond)
    assert not {name: pixels for name, pixels in wide.items() if pixels > 1}


FITS = """() => {
    document.querySelectorAll('details').forEach(details => { details.open = true });
    const hint = box => getComputedStyle(box).backgroundImage.includes('gradient');
    const wide = box => box.scrollWidth > box.clientWidth + 2;
    return [...document.querySelectorAll('.bd-article pre, .bd-article table')]
        .filter(cell => cell.offsetHeight > 0 && cell.offsetWidth > 0)
        .map(cell => {
            const boxes = [cell, cell.parentElement, cell.parentElement.parentElement];
            const scrolls = boxes.filter(box => wide(box)
                && ['auto', 'scroll', 'hidden'].includes(getComputedStyle(box).overflowX));
            return {name: cell.innerText.slice(0, 40), cut: scrolls.length > 0,
                    told: scrolls.every(hint), code: cell.tagName === 'PRE'};
        })}"""


def test_no_table_or_code_is_cut_off_without_a_hint(browser, site, visits):
    seen, wrong = 0, []
    for width in (1280, 390):
        with browser.new_context(viewport={"width": width, "height": 900}) as context:
            for name in visits:
                with context.new_page() as page:
                    page.goto(site + name)
                    cells = page.evaluate(FITS)
                seen += len(cells)
                for cell in cells:
                    allowed = width == 390 and cell["told"] and not cell["code"]
                    if cell["cut"] and not allowed:
                        wrong.append((width, name, cell["name"]))
    assert seen > 500 and not wrong, wrong


def test_pages_are_printed_into_one_file(browser, built, tmp_path):
    names = ["book/intro", "notebooks/11_claims"]
    with ThreadPoolExecutor(1) as apart:  # from the browser of the other tests
        task = apart.submit(pdf.print_pages, built / "html", tmp_path / "book.pdf", names)
    printed = pypdf.PdfReader(task.result())
    assert len(printed.outline) == 2 and len(printed.pages) > 10
    text = "".join(page.extract_text() for page in printed.pages)
    text = unicodedata.normalize("NFKC", text)  # the ligature of ff
    assert "Vision-language diffusion" in text and "margin" in text
    assert sum(len(page.images) for page in printed.pages) > 3
