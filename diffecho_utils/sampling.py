"""From noise to echocardiograms: run a solver, and write a synthetic data set.

Chapters 03 to 07.
"""

import hashlib
import inspect
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import broadcast_object_list
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image, UnidentifiedImageError

from diffecho_utils import DiffEchoError, camus, data, models, prompts, results

METADATA = ["file_name", "view", "phase", "prompt", "seed", "label_map"]


ALL_CLASSES = tuple(range(len(camus.CLASSES)))

# What each generator is told.
CONDITIONS = {
    "unconditional": {"classes"},
    "text": {"prompts"},
    "text-seg": {"prompts", "masks"},
    "sdm": {"masks"},
}

# The paper's sentences for those that read one.
TEMPLATES = {"text": "paper", "text-seg": "paper-seg"}

# Chapter 07 writes each of them by hand; build one by `.from_config(generator.scheduler.config)`.
SOLVERS = {
    "DDPM": DDPMScheduler,
    "DDIM": DDIMScheduler,
    "Euler": EulerDiscreteScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}


@torch.no_grad()
def sample(
    generator,
    seeds,
    steps,
    *,
    guidance=1.0,
    guidance_interval=None,
    scheduler=None,
    batch=50,
    progress=None,
    **conditions,
):
    """Draw one image for each seed: (N, 1, H, W) float32 in [-1, 1].

    generator: `models.Generator`; seeds: N integers, each of which fixes its image's noise whatever
    the batch; conditions as in `CONDITIONS`: classes, N indices into `camus.CLASSES`; prompts, N
    texts; masks, (N, H, W) uint8 label maps. `guidance` weighs the condition against the null
    condition (Ho and Salimans 2022); 1 leaves it as trained; `guidance_interval`, (low, high), keeps
    it to those timesteps, both included (Kynkaanniemi et al. 2024). `scheduler` is any diffusers
    scheduler built from the generator's configuration (one that puts noise in draws it from each
    image's own stream, if its `step` takes a generator); the default, DPM-Solver++, needs about 20
    steps. `progress(done, N)` is called after each batch. Raises DiffEchoError for conditions that
    are missing, too many or of the wrong size, and for an empty interval.
    """
    _check_conditions(generator, len(seeds), guidance, conditions)
    low, high = _check_interval(guidance_interval, generator)
    if scheduler is None:
        scheduler = DPMSolverMultistepScheduler.from_config(generator.scheduler.config)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    device = next(generator.denoiser.parameters()).device
    images = []
    for first in range(0, len(seeds), batch):
        part = slice(first, first + batch)
        streams = _streams(seeds[part])
        fresh = {"generator": streams} if draws else {}
        latents = _noise(streams, generator.latent_shape).to(device)
        given, null = _conditions(generator, device, {k: v[part] for k, v in conditions.items()})
        scheduler.set_timesteps(steps, device=device)
        latents = latents * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            inputs = scheduler.scale_model_input(latents, timestep)
            times = timestep.expand(len(inputs)).to(device)
            prediction = generator.denoiser(inputs, times, **given)
            if guidance != 1 and low <= timestep <= high:
                unguided = generator.denoiser(inputs, times, **null)
                prediction = unguided + guidance * (prediction - unguided)
            latents = scheduler.step(prediction, timestep, latents, **fresh).prev_sample
        images.append(data.decode(generator.vae, latents))
        if progress:
            progress(min(first + batch, len(seeds)), len(seeds))
    return torch.cat(images)


def _conditions(generator, device, conditions):
    """The denoiser's arguments for these conditions, and for the null condition."""
    given, null = {}, {}
    if "classes" in conditions:
        given["classes"] = torch.as_tensor(conditions["classes"], device=device)
    if "prompts" in conditions:
        texts = list(conditions["prompts"])
        given["text"], null["text"] = generator.text(texts), generator.text([""] * len(texts))
    if "masks" in conditions:
        given["masks"] = null["masks"] = torch.as_tensor(conditions["masks"]).to(device)
        if "prompts" not in conditions:
            null["unlabelled"] = torch.ones(len(given["masks"]), dtype=torch.bool, device=device)
    return given, null


def _check_conditions(generator, n, guidance, conditions):
    wanted = CONDITIONS[generator.model]
    if set(conditions) != wanted:
        raise DiffEchoError(
            f"the {generator.model} generator is told {sorted(wanted)}, given {sorted(conditions)}"
        )
    for name, values in conditions.items():
        if len(values) != n:
            raise DiffEchoError(f"{len(values)} {name} for {n} seeds; give one of each an image")
    untrained = set(np.asarray(conditions.get("classes", [])).tolist()) - set(generator.classes)
    if untrained:
        names = [camus.CLASS_NAMES[index] for index in sorted(untrained)]
        raise DiffEchoError(f"the generator was trained without frames of {', '.join(names)}")
    if guidance != 1 and generator.model == "unconditional":
        raise DiffEchoError(
            "the unconditional generator has no null condition; leave guidance at 1"
        )
    if "masks" not in conditions:
        return
    sides = (generator.side, generator.side)
    if tuple(conditions["masks"].shape[1:]) != sides:
        raise DiffEchoError(
            f"label maps of {tuple(conditions['masks'].shape[1:])} pixels for images of {sides}; "
            "load them in the generator's geometry (`data.load_frames(rows, generator)`)"
        )


def _check_interval(interval, generator):
    last = generator.scheduler.config.num_train_timesteps - 1
    if interval is None:
        return 0, last
    low, high = interval
    if not 0 <= low <= high <= last:
        raise DiffEchoError(
            f"guidance interval {low} to {high}: give the lower timestep first, both from 0 (the "
            f"picture) to {last} (noise)"
        )
    return low, high


def initial_noise(seeds, shape):
    """Standard normal noise, one draw a seed on the CPU: (N, *shape), the same on every device."""
    return _noise(_streams(seeds), shape)


def _streams(seeds):
    """A random generator for each seed: its first draw is the image's initial noise."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _noise(streams, shape):
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams])


def told(model, frames):
    """What a generator of `model` is told of `frames` (data.Frames): the conditions of `sample`."""
    known = {"classes": frames.classes, "masks": frames.masks}
    if model in TEMPLATES:
        known["prompts"] = prompts.make(frames.table, TEMPLATES[model])
    return {name: known[name] for name in CONDITIONS[model]}


def plan(model, count, frames=None, template=None, classes=ALL_CLASSES):
    """What to draw: (table, masks) for `count` images of each of `classes`, indices into `camus.CLASSES`.

    table: view, phase and prompt of each image ("" for generators that read none); template: of the
    prompts, by default `TEMPLATES`. masks: (N, H, W)
    uint8 label maps for generators that are told them, else None: those of `frames` (data.Frames),
    class by class in their order, over again where there are fewer than `count`.
    """
    template = template or TEMPLATES.get(model)
    pairs = [camus.CLASSES[index] for index in np.repeat(classes, count)]
    table = pd.DataFrame(pairs, columns=["view", "phase"])
    wanted, masks = "prompts" in CONDITIONS[model], None
    if "masks" in CONDITIONS[model]:
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
        known = prompts.facts(frames) if wanted else frames.table
        table = known.iloc[rows].reset_index(drop=True)
    return table.assign(prompt=prompts.make(table, template) if wanted else ""), masks


def write_synthetic(
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
):
    """Write one image for each row of `plan`'s table as a synthetic data set; returns its metadata.

    FOLDER/images/*.png (8-bit grey), label_maps/*.png (labels 0-3, where there are any),
    metadata.csv (`METADATA`, one row an image), dataset.json (`facts`, the settings, how many of
    each class) and README.md, the data card. Image i has the seed `seed` + i; solver: one of
    `SOLVERS`. Images that are there already are kept, so an interrupted run goes on: it draws
    whole batches again that are not whole, so that an image comes out of the batch it would have
    come out of. Under `accelerate launch` the batches are shared among the processes. metadata.csv is
    written last, when all is there. `progress(done, N)` counts this process's images and those
    that were there. Raises DiffEchoError if FOLDER holds a set of other settings or weights.
    """
    if solver not in SOLVERS:
        raise DiffEchoError(f"no solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    folder, n, state = Path(folder), len(table), models.processes()
    known = {
        "classes": camus.class_index(table),
        "prompts": table["prompt"].to_numpy(),
        "masks": masks,
    }
    known = {name: known[name] for name in CONDITIONS[generator.model]}
    _check_conditions(generator, n, guidance, known)
    _check_interval(guidance_interval, generator)
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
        images = sample(
            generator,
            metadata["seed"].to_numpy()[rows],
            steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            scheduler=SOLVERS[solver].from_config(generator.scheduler.config),
            batch=batch,
            **{name: values[rows] for name, values in known.items()},
        )
        for row, image in zip(rows, images, strict=True):
            if row not in lost:
                continue
            if masks is not None:
                _save_grey(masks[row].numpy(), folder / metadata["label_map"][row])
            save_image(image, folder / metadata["file_name"][row])
        done += len(lost & {*rows})
        if progress:
            progress(done, total)
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(folder, metadata, described)
    return metadata


def _claim(folder, described, with_masks):
    """Make FOLDER this set's, or find that it is; DiffEchoError if it is another's."""
    path = folder / "dataset.json"
    text = json.dumps(described, indent=1) + "\n"
    if path.exists():
        try:
            known = json.loads(path.read_text())
        except ValueError as error:
            raise DiffEchoError(
                f"{path}: half-written ({error}); delete {folder} and sample again"
            ) from None
        old, new = known.get("settings", {}), json.loads(text)["settings"]
        odd = sorted(name for name in old | new if old.get(name) != new.get(name))
        if odd:
            raise DiffEchoError(
                f"{path}: made with other settings ({', '.join(odd)}); choose another folder, or "
                "delete it"
            )
    for name in ("images", "label_maps") if with_masks else ("images",):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not path.exists():
        results.write_text(path, text)


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
    results.write_text(folder / "README.md", _card(described))
    results.write_text(folder / "metadata.csv", metadata.to_csv(index=False))


def read_synthetic(folder, side=None):
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
            f"{path}: {f'lacks the columns {lost}' if lost else 'no rows'}; sample again"
        )
    pairs = dict.fromkeys(zip(table["view"], table["phase"], strict=True))
    unknown = [pair for pair in pairs if pair not in camus.CLASSES]
    if unknown:
        raise DiffEchoError(f"{path}: view and phase {unknown}, known are {camus.CLASSES}")
    missing = [name for name in table["file_name"] if not (folder / name).is_file()]
    if missing:
        raise DiffEchoError(
            f"{path}: {len(missing)} of the {len(table)} images it names are missing (first: "
            f"{missing[0]}); copy them there, or sample again"
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


def read_frames(folder, side=None):
    """A synthetic set as `data.Frames`, its label maps all background where it has none.

    The table has view, phase, prompt and seed; each image is a patient of its own. side and errors as in
    `read_synthetic`.
    """
    images, table = read_synthetic(folder, side)
    side = images.shape[-1]
    masks = read_label_maps(folder, table, side)
    if masks is None:
        masks = torch.zeros(len(images), side, side, dtype=torch.uint8)
    patients = [f"{Path(folder).name}/{name}" for name in table["file_name"]]
    return data.Frames(images, masks, table.assign(patient=patients))


def read_settings(folder):
    """The settings in a synthetic set's dataset.json; {} for a folder that has none."""
    path = Path(folder) / "dataset.json"
    try:
        return json.loads(path.read_text()).get("settings", {}) if path.is_file() else {}
    except ValueError as error:
        raise DiffEchoError(f"{path}: half-written ({error}); sample again") from None


def digest(generator):
    """Sixteen hexadecimal digits that change with any weight of the generator, and with its dials."""
    dials = [dict(generator.scheduler.config), getattr(generator.denoiser, "strength", 1.0)]
    content = hashlib.sha256(json.dumps(dials, sort_keys=True, default=str).encode())
    for network in (generator.denoiser, generator.vae, generator.text and generator.text.model):
        for tensor in network.state_dict().values() if network is not None else ():
            content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()[:16]


def save_image(image, path):
    """Write one image (1, H, W) in [-1, 1] as 8-bit grey PNG, beside first, then renamed."""
    pixels = ((image[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    _save_grey(pixels, Path(path))


def _save_grey(pixels, path):
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    Image.fromarray(pixels).save(beside, format="PNG")
    os.replace(beside, path)


def plan_digest(metadata, masks):
    """What fixes the images beside the settings, in short: a set of another plan is another set.

    metadata: a table of what is told of each image; masks: (N, H, W) uint8 label maps, or None.
    """
    content = hashlib.sha256(metadata.to_csv(index=False).encode())
    if masks is not None:
        content.update(masks.numpy().tobytes())
    return content.hexdigest()[:16]


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
  `diffecho_utils.sampling.read_synthetic`.

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
