"""Figures hold what they are given."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from diffecho_utils import plots


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_grid_shows_every_frame_with_its_labels(frames):
    figure = plots.frames(frames.images[:5], [f"frame {i}" for i in range(5)], frames.masks[:5], 3)
    shown = [axis for axis in figure.axes if axis.images]
    assert len(figure.axes) == 6 and len(shown) == 5
    np.testing.assert_array_equal(shown[2].images[0].get_array(), frames.images[2, 0])
    assert shown[4].get_title() == "frame 4" and all(len(axis.collections) == 3 for axis in shown)
    assert {t.get_text() for t in figure.legends[0].get_texts()} == set(plots.LABEL_COLOURS)
    colours = plots.label_picture(frames.masks[:2])
    assert colours.shape == (2, 64, 64, 3) and not colours[frames.masks[:2].numpy() == 0].any()
    figure = plots.frames(frames.images[:1], masks=frames.masks[:1], outline=False)
    assert len(figure.axes[0].images) == 2


def test_curves_histograms_intervals():
    series = {"a": ([0, 1], [1, 2]), "b": ([0, 1], [2, 1])}
    (axis,) = plots.curves(series, "step", "loss", bands={"a": ([0, 1], [2, 3])}).axes
    assert len(axis.lines) == 2 == len(axis.collections) + 1 and axis.get_ylabel() == "loss"
    (axis,) = plots.histograms({"real": np.arange(50.0)}, "EF (%)", reference={"45 %": 45}).axes
    assert axis.get_xlabel() == "EF (%)" and list(axis.lines[0].get_xdata()) == [45, 45]
    values = {"x": (2, 1, 3), "y": (5, 4, 6)}
    (axis,) = plots.intervals(values, "distance", floor=(0, 1)).axes
    assert [t.get_text() for t in axis.get_yticklabels()] == ["x", "y"]
    (axis,) = plots.intervals(values, "", floor={"x": (0, 1), "y": (2, 4)}).axes
    bands = [band.get_datalim(axis.transData).extents.tolist() for band in axis.collections]
    assert bands == [[0, -0.5, 1, 0.5], [2, 0.5, 4, 1.5]]


def test_show_gives_figure_and_caption(capsys, frames):
    figure = plots.frames(frames.images[:1])
    plots.show(figure, "One frame.", "Live: phantom")
    assert not plt.fignum_exists(figure.number)
    assert "Markdown" in capsys.readouterr().out


def test_sliders_in_a_notebook_and_all_their_positions_on_a_page(monkeypatch):
    asked, shown = [], []
    monkeypatch.setattr(plots, "display", lambda *things: shown.extend(things))

    def draw(size, tilt):
        asked.append((size, tilt))
        return torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)

    plots.explore(draw, "A square.", "Live", size=(1, 2, 3), tilt=(0, 10))
    *sliders, picture, _ = shown
    assert [slider.value for slider in sliders] == [2, 10] and asked == [(2, 10)]
    first = bytes(picture.value)
    sliders[0].value = 3
    assert asked[-1] == (3, 10), "a moved slider draws again"
    assert bytes(picture.value).startswith(b"\x89PNG") and picture.value != first
    monkeypatch.setenv("DIFFECHO_PAGES", "1")
    asked.clear()
    shown.clear()
    plots.explore(draw, "A square.", "Live", size=(1, 2, 3), tilt=(0, 10))
    assert asked == [(s, t) for s in (1, 2, 3) for t in (0, 10)]
    figure, caption = shown
    assert [axis.get_title() for axis in figure.axes] == [f"size {s}, tilt {t}" for s, t in asked]
    assert "sliders" in caption.data
