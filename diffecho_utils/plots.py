"""The book's figures: grids of echocardiograms, label maps over them, curves, and their captions.

Every chapter. Functions return a matplotlib Figure; `show` displays it with its caption.
"""

import io
import itertools
import os

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from diffecho_utils.camus import LABELS

# Okabe and Ito's palette: told apart by colour-blind readers, on black and on white.
LABEL_COLOURS = {"LV cavity": "#56b4e9", "myocardium": "#e69f00", "LA": "#cc79a7"}
SERIES_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

# Of every figure; a chapter that draws its own does so within `plt.rc_context(plots.STYLE)`.
STYLE = {
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "axes.prop_cycle": plt.cycler(color=SERIES_COLOURS),
}
_BAND = {"color": "0.5", "alpha": 0.25, "lw": 0}  # what real frames score against each other
styled = plt.rc_context(STYLE)


def show(figure, caption, source):
    """Display a figure and, below it, its caption and where it comes from (live or recorded)."""
    display(figure, Markdown(f"**Figure.** {caption} *{source}.*"))
    plt.close(figure)


def explore(draw, caption, source, **dials):
    """Pictures with sliders in a notebook; on a page of the book, pictures for all positions.

    draw(**position): images (N, 1, H, W) in [-1, 1], or (images, label maps (N, H, W)); dials: {name:
    values}, one slider each. The first picture is that of the values in the middle.
    """

    def figure_of(positions, **layout):
        images, titles, masks = [], [], []
        for position in positions:
            drawn = draw(**position)
            pictures, maps = drawn if isinstance(drawn, tuple) else (drawn, ())
            words = [f"{name.replace('_', ' ')} {value:g}" for name, value in position.items()]
            images.extend(pictures)
            masks.extend(maps)
            titles += [", ".join(words)] * len(pictures)
        return frames(np.stack(images), titles, masks or None, **layout)

    if os.environ.get("DIFFECHO_PAGES"):
        places = itertools.product(*dials.values())
        *_, last = dials.values()
        columns = len(last) if len(dials) > 1 else min(len(last), 6)
        figure = figure_of(
            [dict(zip(dials, place, strict=True)) for place in places], columns=columns
        )
        show(figure, f"{caption} In the notebook, sliders set these values.", source)
        return
    import ipywidgets

    sliders = {}
    for name, values in dials.items():
        sliders[name] = ipywidgets.SelectionSlider(options=list(values), continuous_update=False)
        sliders[name].value = values[len(values) // 2]
        sliders[name].description = name.replace("_", " ")

    # An Image, not interactive_output: an Output widget's messages can cross the reply of its cell,
    # which then never ends where no browser listens, as under papermill.
    picture = ipywidgets.Image(format="png")

    def redraw(_=None):
        figure = figure_of([{name: slider.value for name, slider in sliders.items()}], width=2.4)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", bbox_inches="tight")
        plt.close(figure)
        picture.value = drawn.getvalue()

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    redraw()
    display(*sliders.values(), picture, Markdown(f"**Figure.** {caption} *{source}.*"))


@styled
def frames(images, titles=None, masks=None, columns=None, outline=True, width=1.6):
    """Grid of pictures, each with its title and its label map.

    images: (N, 1, H, W) or (N, H, W), in [-1, 1]; masks: (N, H, W) CAMUS labels, drawn as outlines,
    or as translucent areas with `outline=False`; width: inches of one picture.
    """
    images = np.asarray(images)
    images = images.reshape(-1, *images.shape[-2:])
    columns = columns or min(len(images), 8)
    rows = -(-len(images) // columns)
    height = width * images.shape[1] / images.shape[2] + (0.05 if titles is None else 0.25)
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, figsize=(columns * width, rows * height), layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        axis.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="lanczos")
        if masks is not None:
            _draw_labels(axis, np.asarray(masks[i]), outline)
        if titles is not None:
            axis.set_title(titles[i])
    if masks is not None:
        legend = [Patch(color=colour, label=name) for name, colour in LABEL_COLOURS.items()]
        figure.legend(handles=legend, loc="outside lower center", ncols=3)
    return figure


def _draw_labels(axis, mask, outline):
    if not outline:
        areas = np.dstack([label_picture(mask), 0.55 * (mask > 0)])
        axis.imshow(areas, interpolation="nearest")
        return
    for name in ("myocardium", "LA", "LV cavity"):  # shared borders show the cavity's colour
        region = mask == LABELS[name]
        if region.any():
            axis.contour(region, levels=[0.5], colors=[LABEL_COLOURS[name]], linewidths=1.2)


def label_picture(masks):
    """Label maps as colours: (N, H, W) -> (N, H, W, 3) in [0, 1], background black."""
    palette = np.zeros((4, 3))
    for name, colour in LABEL_COLOURS.items():
        palette[LABELS[name]] = to_rgb(colour)
    return palette[np.asarray(masks)]


@styled
def curves(series, xlabel, ylabel, *, bands=None, log_y=False):
    """Lines: {name: (x, y)}, with optional bands {name: (low, high)} around them."""
    figure, axis = plt.subplots(figsize=(5.0, 3.0), layout="constrained")
    for name, (x, y) in series.items():
        (line,) = axis.plot(x, y, label=name)
        if bands and name in bands:
            axis.fill_between(x, *bands[name], color=line.get_color(), alpha=0.2, lw=0)
    axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log_y else "linear")
    if len(series) > 1:
        axis.legend()
    return figure


@styled
def histograms(series, xlabel, *, bins=30, size=(5.0, 2.6), reference=None):
    """Overlaid densities of {name: values}; `reference`: {text: x} marks values by a vertical line."""
    series = {name: np.ravel(values) for name, values in series.items()}
    everything = np.concatenate(list(series.values()))
    edges = np.linspace(*np.nanquantile(everything, [0.001, 0.999]), bins + 1)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    for name, values in series.items():
        axis.hist(values, edges, density=True, histtype="step", lw=1.6, label=name)
    for text, x in (reference or {}).items():
        axis.axvline(x, color="0.3", ls=":", lw=1)
        axis.annotate(text, (x, axis.get_ylim()[1]), fontsize=8, ha="left", va="top")
    axis.set(xlabel=xlabel, ylabel="density")
    figure.legend(loc="outside upper center", ncols=2)  # bars may fill the axes
    return figure


@styled
def intervals(values, xlabel, *, floor=None, size=(5.0, None)):
    """One row a name: {name: (value, low, high)}.

    `floor`: the band that noise alone gives, (low, high), or a dict of one for each name.
    """
    width, height = size[0], size[1] or 0.8 + 0.32 * len(values)
    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    floors = floor if isinstance(floor, dict) else dict.fromkeys(values, floor)
    for row, (name, (value, low, high)) in enumerate(values.items()):
        if floors[name] is not None:
            label = None if axis.collections else "real against real"
            axis.fill_betweenx([row - 0.5, row + 0.5], *floors[name], label=label, **_BAND)
        axis.plot([low, high], [row, row], color=SERIES_COLOURS[0], lw=2)
        axis.plot(value, row, "o", color=SERIES_COLOURS[0])
    axis.set(xlabel=xlabel, yticks=range(len(values)), yticklabels=list(values))
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.locator_params(axis="x", nbins=6)
    if axis.get_xlim()[0] < 0 < axis.get_xlim()[1]:
        axis.axvline(0, color="0.3", lw=1)
    if floor is not None:
        axis.legend(loc="best")
    return figure


@styled
def panel(table):
    """What a set scores beside what real frames score: one axis a score, one row a class.

    table: `metrics.panel`'s, and further scores that have a <name>_floor beside them. Of `distance`,
    the first, the 95 % intervals are drawn, too.
    """
    scores = ["distance", *(name for name in table if f"{name}_floor" in table)]
    rows, places = -(-len(scores) // 4), np.arange(len(table))
    size = (9.2, rows * (0.8 + 0.26 * len(table)))
    figure, axes = plt.subplots(
        rows, 4, squeeze=False, sharey=True, figsize=size, layout="constrained"
    )
    for axis in axes.flat[len(scores) :]:
        axis.axis("off")
    for axis, score in zip(axes.flat, scores, strict=False):
        floor = "floor" if score == "distance" else f"{score}_floor"
        if score == "distance":
            low, high = table["floor_low"], table["floor_high"]
            axis.barh(places, high - low, 1, low, **_BAND)
            axis.hlines(places, table["low"], table["high"], color=SERIES_COLOURS[0], lw=2)
        axis.plot(table[floor], places, "|", color="0.3", ms=12, mew=2, label="real, held out")
        axis.plot(table[score], places, "o", color=SERIES_COLOURS[0], label="this set")
        axis.set(title=score.replace("_", " "), yticks=places, yticklabels=table.index)
        axis.set_ylim(len(table) - 0.5, -0.5)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure
