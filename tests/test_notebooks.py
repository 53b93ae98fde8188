"""The chapters themselves, executed whole at the smallest size, on the real frames where they are."""

import nbformat

from diffecho_utils import assets, results


def test_every_chapter_runs_and_its_figures_say_where_they_come_from(built):
    names = [path.stem for path in sorted((assets.root() / "notebooks").glob("*.ipynb"))]
    assert len(names) >= 3
    for name in names:
        page = (built / "html" / "notebooks" / f"{name}.html").read_text()
        assert "Traceback (most recent call last)" not in page and page.count("<img") > 3
        record = results.load(built / "results" / f"{name}.json")
        assert record["profile"] == "smoke" and record["values"]
        for cell in nbformat.read(built / "executed" / f"{name}.ipynb", as_version=4).cells:
            outputs = [output.get("data", {}) for output in cell.get("outputs", [])]
            captions = [data["text/markdown"] for data in outputs if "text/markdown" in data]
            captions = [text for text in captions if text.startswith("**Figure.**")]
            assert len(captions) == sum("image/png" in data for data in outputs), cell.source
            assert all("Live" in text or "Recorded" in text for text in captions), captions
