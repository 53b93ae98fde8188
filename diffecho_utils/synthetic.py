"""A synthetic data set on disk: what to draw, drawing it so that it can go on, reading it back.

Chapters 07 to 10. FOLDER/images/*.png, label_maps/*.png, metadata.csv, dataset.json and README.md, the data card.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image, UnidentifiedImageError

from diffecho_utils import (
    DiffEchoError,
    camus,
    data,
    files,
    models,
    prompts,
    results,
    sampling,
)

METADATA = ["file_name", "view", "phase", "prompt", "seed", "label_map"]


def plan(model, count, frames=None, template=None, classes=sampling.ALL_CLASSES):
    """What to draw: (table, masks) for `count` images of each of `classes`, indices into `camus.CLASSES`.

    table: view, phase and prompt of each image ("" for generators that read none); template: of the
    prompts, by default `TEMPLATES`. masks: (N, H, W)
    uint8 label maps for generators that are told them, else None: those of `frames` (data.Frames),
    class by class in their order, over again where there are fewer than `count`.
    """
    template = template or sampling.TEMPLATES.get(model)
    pairs = [camus.CLASSES[index] for index in np.repeat(classes, count)]
    table = pd.DataFrame(pairs, columns=["view", "phase"])
    wanted, masks = "prompts" in sampling.CONDITIONS[model], None
    if "masks" in sampling.CONDITIONS[model]:
        if frames is None:
            raise DiffEchoError(
                f"the {model} generator needs label maps; name a CAMUS folder with them"
            )
        there = frames.classes.numpy()
        rows = []
        for index in classes:
            of_class = np.flatnonzero(there == index)
            if not len(of_class):
                name = camus.CLASS_NAMES[index]
                raise DiffEchoError(f"no label map of class {name} among {len(frames)} frames")
            rows.append(np.resize(of_class, count))
        rows = np.concatenate(rows)
        masks = frames.masks[rows]
        known = prompts.facts(frames.masks, frames.table) if wanted else frames.table
        table = known.iloc[rows].reset_index(drop=True)
    return table.assign(prompt=prompts.make(table, template) if wanted else ""), masks


def write(
    generator,
    folder,
    table,
    masks,
    steps,
    *,
    seed=0,
    guidance=1.0,
    guidance_interval=None,
    solver="DPM-Solver++",
    facts=None,
    progress=None,
    batch=50,
    restart=False,
):
    """Write one image for each row of `plan`'s table as a synthetic data set; returns its metadata.

    FOLDER/images/*.png (8-bit grey), label_maps/*.png (labels 0-3, where there are any),
    metadata.csv (`METADATA`, one row an image), dataset.json (`facts`, the settings, how many of
    each class) and README.md, the data card. Image i has the seed `seed` + i; solver: one of
    `SOLVERS`. Images that are there already are kept, so an interrupted run goes on: it draws
    whole batches again that are not whole, so that an image comes out of the batch it would have
    come out of. Under `accelerate launch` the batches are shared among the processes. metadata.csv is
    written last, when all is there. `progress(done, N)` counts this process's images and those
    that were there. restart: a set that FOLDER holds is thrown away. Raises DiffEchoError if it
    holds a set of other settings or weights.
    """
    if solver not in sampling.SOLVERS:
        raise DiffEchoError(f"no solver {solver!r}; choose one of {', '.join(sampling.SOLVERS)}")
    folder, n, state = Path(folder), len(table), models.processes()
    known = {
        "classes": camus.class_index(table),
        "prompts": table["prompt"].to_numpy(),
        "masks": masks,
    }
    known = {name: known[name] for name in sampling.CONDITIONS[generator.model]}
    sampling.check_conditions(generator, n, guidance, known)
    sampling.check_interval(guidance_interval, generator)
    names = [f"{i:06d}.png" for i in range(n)]
    metadata = pd.DataFrame(
        {
            "file_name": [f"images/{name}" for name in names],
            "view": table["view"],
            "phase": table["phase"],
            "prompt": table["prompt"],
            "seed": seed + np.arange(n),
            "label_map": "" if masks is None else [f"label_maps/{name}" for name in names],
        },
        columns=METADATA,
    )
    settings = {"model": generator.model, "solver": solver, "steps": steps, "seed": seed}
    settings |= {"guidance": guidance}
    settings |= {"guidance_interval": guidance_interval and list(guidance_interval)}
    settings |= {"planned": plan_digest(metadata, masks), "generator": digest(generator)}
    counts = metadata.groupby(["view", "phase"], sort=False).size()
    described = {
        "settings": settings | (facts or {}),
        "counts": {f"{view}-{phase}": int(k) for (view, phase), k in counts.items()},
    }
    if restart and state.is_main_process and (folder / "dataset.json").is_file():
        shutil.rmtree(folder)
    state.wait_for_everyone()
    _claim(folder, described, with_masks=masks is not None)
    lost = _lost(folder, metadata)
    blocks = [range(first, min(first + batch, n)) for first in range(0, n, batch)]
    # One list for all: a process that looked later would see what the others wrote meanwhile.
    (blocks,) = broadcast_object_list([[block for block in blocks if lost & {*block}]])
    mine = blocks[state.process_index :: state.num_processes]
    total = n - len(lost) + sum(len(lost & {*block}) for block in mine)
    done = n - len(lost)
    for block in mine:
        rows = list(block)
        images = sampling.sample(
            generator,
            metadata["seed"].to_numpy()[rows],
            steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            scheduler=sampling.SOLVERS[solver].from_config(generator.scheduler.config),
            batch=batch,
            **{name: values[rows] for name, values in known.items()},
        )
        for row, image in zip(rows, images, strict=True):
            if row not in lost:
                continue
            if masks is not None:
                save_grey(masks[row].numpy(), folder / metadata["label_map"][row])
            save_image(image, folder / metadata["file_name"][row])
        done += len(lost & {*rows})
        if progress:
            progress(done, total)
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(folder, metadata, described)
    return metadata


def read(folder, side=None):
    """(images, table) of a synthetic data set: (N, 1, side, side) float32 in [-1, 1], metadata.

    side: by default the images' own; larger ones are resized with anti-aliasing. The table's attrs say
    whether the generator's frames were `stretched`. Raises DiffEchoError for a folder without metadata,
    classes that CAMUS does not have, missing or unreadable images, colour images, images of several
    sizes, and a side larger than theirs: enlarged ones would be compared with sharp ones.
    """
    folder = Path(folder)
    path = folder / "metadata.csv"
    if not path.is_file():
        raise DiffEchoError(
            f"{path}: missing; `sample` writes it last: run it again to finish the set"
        )
    table = pd.read_csv(path, keep_default_na=False)
    lost = sorted(set(METADATA) - set(table.columns))
    if lost or table.empty:
        raise DiffEchoError(
            f"{path}: {f'lacks the columns {lost}' if lost else 'no rows'}; sampling.sample again"
        )
    pairs = dict.fromkeys(zip(table["view"], table["phase"], strict=True))
    unknown = [pair for pair in pairs if pair not in camus.CLASSES]
    if unknown:
        raise DiffEchoError(f"{path}: view and phase {unknown}, known are {camus.CLASSES}")
    missing = [name for name in table["file_name"] if not (folder / name).is_file()]
    if missing:
        raise DiffEchoError(
            f"{path}: {len(missing)} of the {len(table)} images it names are missing (first: "
            f"{missing[0]}); copy them there, or sampling.sample again"
        )
    images, sizes = [], {}
    for name in table["file_name"]:
        try:
            picture = Image.open(folder / name)
            picture.load()
        except (OSError, UnidentifiedImageError) as error:
            raise DiffEchoError(
                f"{folder / name}: named in metadata.csv, unreadable ({error})"
            ) from None
        if picture.mode != "L":
            raise DiffEchoError(
                f"{folder / name}: mode {picture.mode}, expected 8-bit grey (L); convert it"
            )
        sizes.setdefault(picture.size, name)
        images.append(np.asarray(picture, dtype=np.float32))
    if len(sizes) > 1:
        found = ", ".join(f"{name} {w} x {h}" for (w, h), name in sizes.items())
        raise DiffEchoError(
            f"{folder}: images of several sizes ({found}); resize them all alike, since resizing "
            "changes every distance"
        )
    own = max(images[0].shape)
    if side is not None and side > own:
        raise DiffEchoError(
            f"{folder}: images of {own} px, and {side} px are asked for; enlarging them would compare "
            f"blur with speckle: take a profile of at most {own} px"
        )
    squares = [data.to_square(x, np.zeros(x.shape), (1.0, 1.0), side or own)[0] for x in images]
    table.attrs["stretched"] = read_settings(folder).get("stretched") or False
    return torch.stack(squares)[:, None] / 127.5 - 1, table


def read_frames(folder, side=None):
    """A synthetic set as `data.Frames`, its label maps all background where it has none.

    The table has view, phase, prompt and seed; each image is a patient of its own. side and errors as in
    `read_synthetic`.
    """
    images, table = read(folder, side)
    side = images.shape[-1]
    masks = read_label_maps(folder, table, side)
    if masks is None:
        masks = torch.zeros(len(images), side, side, dtype=torch.uint8)
    patients = [f"{Path(folder).name}/{name}" for name in table["file_name"]]
    return data.Frames(images, masks, table.assign(patient=patients))


def own_side(folder):
    """Pixels of the longer side of a synthetic set's images."""
    with Image.open(next(Path(folder).glob("images/*.png"))) as picture:
        return max(picture.size)


def read_label_maps(folder, table, side):
    """(N, side, side) uint8 label maps of a synthetic set's table, None if it was drawn without.

    Raises DiffEchoError for a map that is missing, unreadable or holds anything but labels 0 to 3.
    """
    if not table["label_map"].astype(bool).all():
        return None
    maps = []
    for name in table["label_map"]:
        try:
            mask = np.asarray(Image.open(Path(folder) / name))
        except (OSError, UnidentifiedImageError) as error:
            raise DiffEchoError(
                f"{Path(folder) / name}: label map named in metadata.csv, unreadable ({error})"
            ) from None
        if mask.ndim != 2 or mask.max() > 3:
            raise DiffEchoError(
                f"{Path(folder) / name}: no label map, of shape {mask.shape} with values up to "
                f"{mask.max()}; expected (H, W) and labels 0 to 3"
            )
        maps.append(data.to_square(np.zeros(mask.shape), mask, (1.0, 1.0), side)[1])
    return torch.stack(maps)


def read_settings(folder):
    """The settings in a synthetic set's dataset.json; {} for a folder that has none."""
    path = Path(folder) / "dataset.json"
    try:
        return json.loads(path.read_text()).get("settings", {}) if path.is_file() else {}
    except ValueError as error:
        raise DiffEchoError(f"{path}: half-written ({error}); sampling.sample again") from None


def digest(generator):
    """Sixteen hexadecimal digits that change with any weight of the generator, and with its dials."""
    dials = [dict(generator.scheduler.config), getattr(generator.denoiser, "strength", 1.0)]
    content = hashlib.sha256(json.dumps(dials, sort_keys=True, default=str).encode())
    for network in (generator.denoiser, generator.vae, generator.text and generator.text.model):
        for tensor in network.state_dict().values() if network is not None else ():
            content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()[:16]


def plan_digest(metadata, masks):
    """What fixes the images beside the settings, in short: a set of another plan is another set.

    metadata: a table of what is told of each image; masks: (N, H, W) uint8 label maps, or None.
    """
    content = hashlib.sha256(metadata.to_csv(index=False).encode())
    if masks is not None:
        content.update(masks.numpy().tobytes())
    return content.hexdigest()[:16]


def save_image(image, path):
    """Write one image (1, H, W) in [-1, 1] as 8-bit grey PNG."""
    pixels = ((image[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    save_grey(pixels, Path(path))


def save_grey(pixels, path):
    """Write pixels (H, W) uint8 as a grey PNG, whole or not at all."""
    with files.draft(path) as beside:
        Image.fromarray(pixels).save(beside, format="PNG")


def _claim(folder, described, with_masks):
    """Make FOLDER this set's, or find that it is; DiffEchoError if it is another's."""
    path = folder / "dataset.json"
    text = json.dumps(described, indent=1) + "\n"
    if path.exists():
        try:
            known = json.loads(path.read_text())
        except ValueError as error:
            raise DiffEchoError(
                f"{path}: half-written ({error}); delete {folder} and sampling.sample again"
            ) from None
        old, new = known.get("settings", {}), json.loads(text)["settings"]
        odd = sorted(name for name in old | new if old.get(name) != new.get(name))
        if odd:
            raise DiffEchoError(
                f"{path}: made with other settings ({', '.join(odd)}); choose another folder, or "
                "begin again with --restart (restart=True)"
            )
    for name in ("images", "label_maps") if with_masks else ("images",):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not path.exists():
        files.write_text(path, text)


def _lost(folder, metadata):
    """Rows whose image or label map is not there."""
    columns = [metadata["file_name"], metadata["label_map"]]
    pairs = zip(*columns, strict=True)
    return {i for i, pair in enumerate(pairs) if not all((folder / name).exists() for name in pair)}


def _finish(folder, metadata, described):
    """Card and metadata, once all is there; what a killed process left half-written is removed."""
    for leftover in folder.glob("*/.*.png.*"):
        leftover.unlink()
    lost = _lost(folder, metadata)
    if lost:
        raise DiffEchoError(
            f"{folder}: {len(lost)} of {len(metadata)} images are missing (first: "
            f"{metadata['file_name'][min(lost)]}); was one of the processes stopped? Sample again"
        )
    files.write_text(folder / "README.md", _card(described))
    files.write_text(folder / "metadata.csv", metadata.to_csv(index=False))


_CITATIONS = {
    "camus": "It derives from CAMUS, whose licence applies (scientific research only, same terms for"
    " what is made from it). Cite S. Leclerc et al., Deep Learning for Segmentation using an Open"
    " Large-Scale Dataset in 2D Echocardiography, IEEE Transactions on Medical Imaging 38(9), 2019,"
    " doi:10.1109/TMI.2019.2900516.",
    "phantom": "It derives from a procedural phantom only; do with it what you like.",
}


def _card(described):
    """README.md of a synthetic set: what it is, how it was made, what it must not be used for."""
    settings, counts = described["settings"], described["counts"]
    worlds = {settings[name] for name in ("world", "masks_world") if settings.get(name)}
    world = "camus" if "camus" in worlds else "phantom" if worlds == {"phantom"} else ""
    licence = results.LICENCES.get(world)
    citation = _CITATIONS.get(
        world, "The licence is that of the data the generator was trained on."
    )
    rows = "\n".join(f"| {name} | {count} |" for name, count in counts.items())
    made = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"""---
license: {licence.lower() if licence else "other"}
tags: [synthetic, medical, echocardiography]
---
# Synthetic echocardiograms

{sum(counts.values())} apical frames drawn by a diffusion model ({settings["model"]}). None was
recorded from a patient. **For research and teaching. Not for clinical use.**

| class | images |
|---|---|
{rows}

- `images/`: 8-bit grey PNG. `label_maps/`, where there are any: the label maps the images were drawn
  to, 0 background, 1 cavity of the left ventricle, 2 myocardium, 3 left atrium.
- `metadata.csv`: one row an image: {", ".join(f"`{name}`" for name in METADATA)}.
- `datasets.load_dataset("imagefolder", data_dir=FOLDER)` reads it, and so does
  `diffecho_utils.synthetic.read`.

## Licence and citation

{licence or "Other"}. {citation}

## How it was made

By `python -m diffecho_utils sample`, with these settings (`dataset.json`); an image's seed fixes it:

| setting | value |
|---|---|
{made}

## What to keep in mind

The images show what the generator learned: the patients, the scanner and the habits of one data set, and
its mistakes. A label map says what was asked for, not what was drawn. A generator may remember training
frames; the book's chapters look for copies.
"""
