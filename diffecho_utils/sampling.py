"""From noise to echocardiograms: run a solver, and write a synthetic data set.

Chapters 03 to 06.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image, UnidentifiedImageError

from diffecho_utils import DiffEchoError, camus, data, prompts, results

METADATA = ["file_name", "view", "phase", "prompt", "seed", "label_map"]


# What each generator is told.
CONDITIONS = {
    "unconditional": {"classes"},
    "text": {"prompts"},
    "text-seg": {"prompts", "masks"},
    "sdm": {"masks"},
}


@torch.no_grad()
def sample(
    generator, seeds, steps, *, guidance=1.0, scheduler=None, batch=50, progress=None, **conditions
):
    """Draw one image for each seed: (N, 1, H, W) float32 in [-1, 1].

    generator: `models.Generator`; seeds: N integers, each of which fixes its image's noise whatever
    the batch; conditions as in `CONDITIONS`: classes, N indices into `camus.CLASSES`; prompts, N
    texts; masks, (N, H, W) uint8 label maps. `guidance` weighs the condition against the null
    condition (Ho and Salimans 2022); 1 leaves it as trained. `scheduler` is any diffusers scheduler
    built from the generator's configuration; the default, DPM-Solver++, needs about 20 steps.
    `progress(done, N)` is called after each batch. Raises DiffEchoError for conditions that are
    missing, too many or of the wrong size.
    """
    _check_conditions(generator, len(seeds), guidance, conditions)
    if scheduler is None:
        scheduler = DPMSolverMultistepScheduler.from_config(generator.scheduler.config)
    device = next(generator.denoiser.parameters()).device
    images = []
    for first in range(0, len(seeds), batch):
        part = slice(first, first + batch)
        latents = initial_noise(seeds[part], generator.latent_shape).to(device)
        given, null = _conditions(generator, device, {k: v[part] for k, v in conditions.items()})
        scheduler.set_timesteps(steps, device=device)
        latents = latents * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            inputs = scheduler.scale_model_input(latents, timestep)
            times = timestep.expand(len(inputs)).to(device)
            prediction = generator.denoiser(inputs, times, **given)
            if guidance != 1:
                unguided = generator.denoiser(inputs, times, **null)
                prediction = unguided + guidance * (prediction - unguided)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
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
    if guidance != 1 and generator.model == "unconditional":
        raise DiffEchoError(
            "the unconditional generator has no null condition; leave guidance at 1"
        )
    if "masks" not in conditions:
        return
    factor = 2 ** (len(generator.vae.config.block_out_channels) - 1)
    sides = tuple(factor * side for side in generator.latent_shape[1:])
    if tuple(conditions["masks"].shape[1:]) != sides:
        raise DiffEchoError(
            f"label maps of {tuple(conditions['masks'].shape[1:])} pixels for images of {sides}; "
            "resize them by nearest neighbour (`data.to_square`)"
        )


def initial_noise(seeds, shape):
    """Standard normal noise, one draw a seed on the CPU: (N, *shape), the same on every device."""
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
    return torch.stack(draws)


def plan(model, count, frames=None, template="paper"):
    """What to draw: (table, masks) for `count` images of each class.

    table: view, phase and prompt of each image ("" for generators that read none). masks: (N, H, W)
    uint8 label maps for generators that are told them, else None: those of `frames` (data.Frames),
    class by class in their order, over again where there are fewer than `count`.
    """
    classes = np.repeat(np.arange(len(camus.CLASSES)), count)
    table = pd.DataFrame([camus.CLASSES[c] for c in classes], columns=["view", "phase"])
    wanted, masks = "prompts" in CONDITIONS[model], None
    if "masks" in CONDITIONS[model]:
        if frames is None:
            raise DiffEchoError(
                f"the {model} generator needs label maps; name a CAMUS folder with them"
            )
        there = frames.classes.numpy()
        rows = []
        for index, name in enumerate(camus.CLASS_NAMES):
            of_class = np.flatnonzero(there == index)
            if not len(of_class):
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
    facts=None,
    progress=None,
    batch=50,
):
    """Write one image for each row of `plan`'s table as a synthetic data set; returns its metadata.

    FOLDER/images/*.png (8-bit grey), label_maps/*.png (labels 0-3, where there are any),
    metadata.csv (`METADATA`, one row an image) and dataset.json (`facts` and the settings). Image i
    has the seed `seed` + i. Images that are there already are kept, so an interrupted run goes on;
    metadata.csv is written last. Raises DiffEchoError if FOLDER holds a set of other settings.
    """
    folder, n = Path(folder), len(table)
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
    settings = {"model": generator.model, "steps": steps, "seed": seed, "guidance": guidance}
    settings |= {"planned": _digest(metadata, masks)} | (facts or {})
    described = folder / "dataset.json"
    if described.exists() and json.loads(described.read_text()).get("settings") != settings:
        raise DiffEchoError(
            f"{described}: made with other settings; choose another folder, or delete it"
        )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    results.write_text(described, json.dumps({"settings": settings}, indent=1) + "\n")
    if masks is not None:
        (folder / "label_maps").mkdir(exist_ok=True)
        for name, mask in zip(names, masks, strict=True):
            _save_grey(mask.numpy(), folder / "label_maps" / name)
    values = {
        "classes": camus.class_index(table),
        "prompts": table["prompt"].to_numpy(),
        "masks": masks,
    }
    todo = [i for i, name in enumerate(metadata["file_name"]) if not (folder / name).exists()]
    for first in range(0, len(todo), batch):
        rows = todo[first : first + batch]
        given = {name: values[name][rows] for name in CONDITIONS[generator.model]}
        seeds = metadata["seed"].to_numpy()[rows]
        images = sample(generator, seeds, steps, guidance=guidance, batch=batch, **given)
        for row, image in zip(rows, images, strict=True):
            save_image(image, folder / metadata["file_name"][row])
        if progress:
            progress(n - len(todo) + first + len(rows), n)
    results.write_text(folder / "metadata.csv", metadata.to_csv(index=False))
    return metadata


def read_synthetic(folder, side):
    """(images, table) of a synthetic data set: (N, 1, side, side) float32 in [-1, 1], metadata.

    Images of another size are resized with anti-aliasing, all of one size alike. Raises DiffEchoError
    for a folder without metadata, classes that CAMUS does not have, missing or unreadable images,
    colour images, and images of several sizes.
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
        array = np.asarray(picture, dtype=np.float32)
        square, _, _ = data.to_square(array, np.zeros(array.shape), (1.0, 1.0), side)
        images.append(square[None])
    if len(sizes) > 1:
        found = ", ".join(f"{name} {w} x {h}" for (w, h), name in sizes.items())
        raise DiffEchoError(
            f"{folder}: images of several sizes ({found}); resize them all alike, since resizing "
            "changes every distance"
        )
    return torch.stack(images) / 127.5 - 1, table


def save_image(image, path):
    """Write one image (1, H, W) in [-1, 1] as 8-bit grey PNG, beside first, then renamed."""
    pixels = ((image[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    _save_grey(pixels, Path(path))


def _save_grey(pixels, path):
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    Image.fromarray(pixels).save(beside, format="PNG")
    os.replace(beside, path)


def _digest(metadata, masks):
    """What fixes the images beside the settings, in short: a set of another plan is another set."""
    content = hashlib.sha256(metadata.to_csv(index=False).encode())
    if masks is not None:
        content.update(masks.numpy().tobytes())
    return content.hexdigest()[:16]
