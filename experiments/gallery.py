"""The picture on the book's first page, book/images/gallery.png: phantom frames, and what each generator draws.

Two phantom patients in the four classes; below, a row for each generator shipped for CAMUS, seeds 0 to 7 from
left to right, never chosen. A generator that reads prompts or label maps is given those of the phantom frame
on top of its column. Half a minute on one core.
"""

import torch
from PIL import Image
from world import draw

from diffecho_utils import assets, camus, data, plots

WORLD, SEEDS, SPLIT = "phantom", [], "validation"
GENERATORS = {"unconditional": "class", "text": "text", "text-seg": "text + map", "sdm": "SDM"}


def rows(world):
    return {}


def collect(world, found):
    table = camus.select(world.table, "validation", patients=2)
    table = table.sort_values(["view", "phase", "patient"])
    # Stretched to a square, as the frames were that the generators learned from.
    frames = data.load_frames(table, data.Geometry(world.profile.side, stretched=True))
    seeds, steps = range(len(frames)), world.profile.sampling_steps
    pictures = [frames.images]
    pictures += [draw(world.generator(model), frames, seeds, steps) for model in GENERATORS]
    titles = [camus.CLASS_NAMES[c] for c in frames.classes]
    titles += [f"seed {seed}" for seed in seeds] * len(GENERATORS)
    empty = torch.zeros(len(frames) * len(GENERATORS), *frames.masks.shape[1:])
    masks = torch.cat([frames.masks, empty])
    figure = plots.frames(torch.cat(pictures), titles, masks=masks, columns=len(frames), width=1.3)
    beside = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 10}
    names = ["phantom", *GENERATORS.values()]
    for axis, name in zip(figure.axes[:: len(frames)], names, strict=True):
        axis.text(-0.06, 0.5, name, transform=axis.transAxes, **beside)
    path = assets.root() / "book" / "images" / "gallery.png"
    figure.savefig(path, dpi=100)
    few = Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)  # a palette: two thirds of the bytes, and grey stays grey
    print("wrote", path)
    return {}
