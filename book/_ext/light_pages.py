"""Sphinx extension: take from the finished pages what they load and never use, and what loads too early.

Sphinx-thebe's script is written twice, which is an error in the browser's console, and no page runs code.
The icons are there as fonts; the theme's script that draws them again weighs 1.5 MB. Pictures below the
first screen can wait until the reader comes near, and take a fraction of the bytes as WebP.
"""

import os
import re
from pathlib import Path

from PIL import Image

LOSSLESS = 60_000  # bytes; what is larger, speckle for the most part, loses what nobody sees
QUALITY = 85

UNUSED = (
    r'<link [^>]*href="[^"]*sphinx-thebe\.css[^"]*"[^>]*>',
    r'<script [^>]*src="[^"]*sphinx-thebe\.js[^"]*"[^>]*></script>',
    r"<script>const THEBE_JS_URL[^<]*</script>",
    r'<script type="text/x-thebe-config">.*?</script>',
    r'<script [^>]*src="[^"]*scripts/fontawesome\.js[^"]*"[^>]*></script>',
)


def setup(app):
    app.connect("build-finished", lighten)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def lighten(app, exception):
    if exception or app.builder.format != "html":
        return
    for path in Path(app.outdir, "_images").glob("*.png"):
        to_webp(path)
    for path in Path(app.outdir).rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        light = re.sub("|".join(UNUSED), "", text, flags=re.S)
        light = re.sub(
            r'<img (?![^>]*loading=)(?=[^>]*src="[^"]*_images/)', '<img loading="lazy" ', light
        )
        light = re.sub(r'(_images/[^"]+)\.png', r"\1.webp", light)
        if light != text:
            path.write_text(light, encoding="utf-8")


def to_webp(path):
    """Put a WebP file in place of a PNG file."""
    target = path.with_suffix(".webp")
    beside = path.with_suffix(".part")
    with Image.open(path) as picture:
        picture.save(beside, "WEBP", lossless=True)
        if beside.stat().st_size > LOSSLESS:
            picture.convert("RGB").save(beside, "WEBP", quality=QUALITY, method=6)
    os.replace(beside, target)
    path.unlink()
