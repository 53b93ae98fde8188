"""The picture on the book's first page: phantom frames, and what each shipped generator draws.

    python benchmarks/gallery.py      (writes book/images/gallery.png, half a minute on one core)

Two phantom patients in the four classes; below, a row for each generator in data/checkpoints/camus,
seeds 0 to 7 from left to right, never chosen. A generator that reads prompts or label maps is given
those of the phantom frame on top of its column.
"""

import torch
from PIL import Image

from diffecho_utils import (
    assets,
    camus,
    checkpoints,
    data,
    phantom,
    plots,
    profiles,
    sampling,
)

GENERATORS = {"unconditional": "class", "text": "text", "text-seg": "text + map", "sdm": "SDM"}


def main():
    profile = profiles.get("cpu")
    root = assets.workspace() / f"phantom-{profile.name}"
    phantom.ensure(root, patients=profile.phantom_patients, seed=profile.phantom_seed)
    rows = camus.select(camus.read_table(root), "validation", patients=2)
    rows = rows.sort_values(["view", "phase", "patient"])
    # Stretched to a square, as the frames were that the generators learned from.
    frames = data.load_frames(rows, data.Geometry(profile.side, stretched=True))
    pictures, names = [frames.images], ["phantom"]
    titles = [camus.CLASS_NAMES[c] for c in frames.classes]
    for model, name in GENERATORS.items():
        folder = assets.root() / "data" / "checkpoints" / "camus" / model
        if folder.is_dir():
            seeds = range(len(frames))
            generator = checkpoints.load_generator(folder)
            dials = {"guidance": generator.guidance} | sampling.told(model, frames)
            pictures.append(sampling.sample(generator, seeds, profile.sampling_steps, **dials))
            names.append(name)
            titles += [f"seed {seed}" for seed in seeds]
    empty = torch.zeros(sum(map(len, pictures[1:])), *frames.masks.shape[1:])
    masks = torch.cat([frames.masks, empty])
    figure = plots.frames(torch.cat(pictures), titles, masks=masks, columns=len(frames), width=1.3)
    beside = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 10}
    for axis, name in zip(figure.axes[:: len(frames)], names, strict=True):
        axis.text(-0.06, 0.5, name, transform=axis.transAxes, **beside)
    path = assets.root() / "book" / "images" / "gallery.png"
    figure.savefig(path, dpi=100)
    few = Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)  # a palette: two thirds of the bytes, and grey stays grey


if __name__ == "__main__":
    main()
