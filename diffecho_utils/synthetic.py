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
from PIL import Image

from diffecho_utils import DiffEchoError, camus, data, files, models, prompts, results, sampling

METADATA = ["file_name", "view", "phase", "prompt", "seed", "label_map"]
_CARD = Path(__file__).with_name("card.md")
_REMEDY = "sample again with --restart (restart=True)"

# Of the data that a set derives from, for its card; what it says of data of unknown terms.
_TERMS = {
    "camus": "It derives from CAMUS, whose licence applies (scientific research only, same terms for"
    " what is made from it). Cite S. Leclerc et al., Deep Learning for Segmentation using an Open"
    " Large-Scale Dataset in 2D Echocardiography, IEEE Transactions on Medical Imaging 38(9), 2019,"
    " doi:10.1109/TMI.2019.2900516.",
    "phantom": "It derives from a procedural phantom only; do with it what you like.",
    "other": "The licence is that of the data the generator was trained on.",
}


def plan(model, count, frames=None, template=None, classes=(0, 1, 2, 3)):
    """What to draw: (table, masks) for `count` images of each of `classes`, indices into `camus.CLASSES`.

    table: view, phase and prompt of each image ("" for generators that read none); template: of the
    prompts, by default `sampling.DRAWING_PROMPTS`. masks: (N, H, W) uint8 label maps for generators that
    are told them, else None: those of `frames` (data.Frames), class by class in their order, over again
    where there are fewer than `count`.
    """
    conditions, masks = sampling.CONDITIONS[model], None
    if "masks" in conditions:
        rows = _rows(model, count, frames, classes)
        known = (
            prompts.facts(frames.masks, frames.table) if "prompts" in conditions else frames.table
        )
        table, masks = known.iloc[rows].reset_index(drop=True), frames.masks[rows]
    else:
        pairs = [camus.CLASSES[index] for index in np.repeat(classes, count)]
        table = pd.DataFrame(pairs, columns=["view", "phase"])
    if "prompts" not in conditions:
        return table.assign(prompt=""), masks
    texts = prompts.make(table, template or sampling.DRAWING_PROMPTS)
    return table.assign(prompt=texts), masks


def _rows(model, count, frames, classes):
    """Indices of the `count` frames of each class whose label maps are drawn to."""
    if frames is None:
        raise DiffEchoError(
            f"the {model} generator needs label maps; name a CAMUS folder with them"
        )
    rows = []
    for index in classes:
        there = np.flatnonzero(frames.classes == index)
        if not len(there):
            name = camus.CLASS_NAMES[index]
            raise DiffEchoError(f"no label map of class {name} among {len(frames)} frames")
        rows.append(np.resize(there, count))
    return np.concatenate(rows)


def write(
    generator,
    folder,
    table,
    masks,
    steps,
    *,
    seed=0,
    guidance=None,
    guidance_interval=None,
    solver="DPM-Solver++",
    facts=None,
    progress=None,
    batch=50,
    restart=False,
):
    """Write one image for each row of `plan`'s table as a synthetic data set; returns its metadata.

    FOLDER/images/*.png (8-bit grey), label_maps/*.png (labels 0-3, where there are any), dataset.json
    (settings and `facts`, how many of each class), README.md, the data card, and, once all is there,
    metadata.csv (`METADATA`, one row an image). Image i has the seed `seed` + i. What is there is kept:
    an interrupted run goes on, and draws each batch that lacks something whole, as it was drawn before.
    Under `accelerate launch` the processes share the batches; `progress(done, total, "images")` counts
    this one's. restart: a set that FOLDER holds is thrown away. Raises DiffEchoError if it holds one of
    other settings or weights, and for what `sampling.check` refuses.
    """
    folder, state = Path(folder), models.processes()
    metadata = _metadata(table, seed, masks)
    settings = {
        "model": generator.model,
        "solver": solver,
        "steps": steps,
        "seed": seed,
        "guidance": generator.guidance if guidance is None else guidance,
        "guidance_interval": guidance_interval and list(guidance_interval),
        "planned": plan_digest(metadata, masks),
        "generator": digest(generator),
        **(facts or {}),
    }
    conditions = _conditions(generator, table, masks, settings)
    _claim(folder, metadata, settings, restart, state)
    batches = np.split(np.arange(len(table)), range(batch, len(table), batch))
    mine = batches[state.process_index :: state.num_processes]
    done, total = 0, sum(map(len, mine))
    for rows in mine:
        lost = _lost(folder, metadata.iloc[rows])
        if lost:
            images = _draw(generator, settings, metadata, conditions, rows)
        for row in lost:
            save_image(images[row - rows[0]], folder / metadata["file_name"][row])
            if masks is not None:
                save_grey(masks[row].numpy(), folder / metadata["label_map"][row])
        done += len(rows)
        if progress:
            progress(done, total, "images")
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(folder, metadata)
    return metadata


def _metadata(table, seed, masks):
    """metadata.csv of what is planned."""
    names = [f"{row:06d}.png" for row in range(len(table))]
    added = {
        "file_name": [f"images/{name}" for name in names],
        "seed": seed + np.arange(len(names)),
        "label_map": "" if masks is None else [f"label_maps/{name}" for name in names],
    }
    return table.reset_index(drop=True).assign(**added)[METADATA]


def _conditions(generator, table, masks, settings):
    """What the generator is told of all images; DiffEchoError where it could not draw them."""
    if settings["solver"] not in sampling.SOLVERS:
        known = ", ".join(sampling.SOLVERS)
        raise DiffEchoError(f"no solver {settings['solver']!r}; choose one of {known}")
    classes, texts = camus.class_index(table), table["prompt"].to_numpy()
    known = {"classes": classes, "prompts": texts, "masks": masks}
    conditions = {name: known[name] for name in sampling.CONDITIONS[generator.model]}
    how = settings["guidance"], settings["guidance_interval"]
    sampling.check(generator, len(table), *how, conditions)
    return conditions


def _claim(folder, metadata, settings, restart, state):
    """Make FOLDER this set's, or find that it is; DiffEchoError if it is another's."""
    path = folder / "dataset.json"
    if restart and state.is_main_process and path.is_file():
        shutil.rmtree(folder)
    state.wait_for_everyone()
    if path.exists():
        old, new = read_settings(folder), json.loads(json.dumps(settings))
        odd = sorted(name for name in old | new if old.get(name) != new.get(name))
        if odd:
            raise DiffEchoError(
                f"{path}: made with other settings ({', '.join(odd)}); choose another folder, or {_REMEDY}"
            )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if metadata["label_map"].any():
        (folder / "label_maps").mkdir(exist_ok=True)
    if not path.exists():
        counts = (metadata["view"] + "-" + metadata["phase"]).value_counts(sort=False).to_dict()
        described = {"settings": settings, "counts": counts}
        files.write_text(path, json.dumps(described, indent=1) + "\n")


def _lost(folder, metadata):
    """Rows of `metadata` whose image or label map is not there."""
    named = metadata[["file_name", "label_map"]].itertuples(name=None)
    return [row for row, *names in named if not all((folder / name).exists() for name in names)]


def _draw(generator, settings, metadata, conditions, rows):
    """The images of these rows, a whole batch: (len(rows), 1, H, W)."""
    scheduler = sampling.SOLVERS[settings["solver"]]
    return sampling.sample(
        generator,
        metadata["seed"].to_numpy()[rows],
        settings["steps"],
        guidance=settings["guidance"],
        guidance_interval=settings["guidance_interval"],
        scheduler=scheduler.from_config(generator.scheduler.config),
        batch=len(rows),
        **{name: values[rows] for name, values in conditions.items()},
    )


def _finish(folder, metadata):
    """Card and metadata, once all is there; what a killed process left half-written is removed."""
    for leftover in folder.glob("*/.*.png.*"):
        leftover.unlink()
    lost = _lost(folder, metadata)
    if lost:
        raise DiffEchoError(
            f"{folder}: {len(lost)} of {len(metadata)} images are missing (first: "
            f"{metadata['file_name'][lost[0]]}); was one of the processes stopped? Sample again"
        )
    files.write_text(folder / "README.md", card(folder))
    files.write_text(folder / "metadata.csv", metadata.to_csv(index=False))


def card(folder):
    """README.md of a synthetic set: what it is, how it was made, what it must not be used for."""
    described = files.read_json(folder / "dataset.json", _REMEDY)
    settings, counts = described["settings"], described["counts"]
    worlds = {settings.get("world"), settings.get("masks_world")} - {None}
    world = "camus" if "camus" in worlds else "phantom" if worlds == {"phantom"} else "other"
    licence = results.LICENCES.get(world, "Other")
    facts = {
        "licence": licence.lower(),
        "count": sum(counts.values()),
        "model": settings["model"],
        "columns": ", ".join(f"`{name}`" for name in METADATA),
        "terms": f"{licence}. {_TERMS[world]}",
    }
    for name in ("counts", "settings"):
        facts[name] = "\n".join(f"| {key} | {value} |" for key, value in described[name].items())
    return _CARD.read_text().format_map(facts)


def read(folder, side=None):
    """(images, table) of a synthetic data set: (N, 1, side, side) float32 in [-1, 1], metadata.

    side: by default the images' own; larger ones are resized with anti-aliasing. The table's attrs say
    whether the generator's frames were `stretched`. Raises DiffEchoError for a folder without metadata,
    classes that CAMUS does not have, missing or unreadable images, colour images, images of several
    sizes, and a side larger than theirs: enlarged ones would be compared with sharp ones.
    """
    folder = Path(folder)
    table = _read_metadata(folder / "metadata.csv")
    images = [_read_grey(folder / name) for name in table["file_name"]]
    sizes = {image.shape: name for image, name in zip(images, table["file_name"], strict=True)}
    if len(sizes) > 1:
        found = ", ".join(f"{name} {w} x {h}" for (h, w), name in sizes.items())
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
    squares = [data.to_square(image, image, (1.0, 1.0), side or own)[0] for image in images]
    table.attrs["stretched"] = read_settings(folder).get("stretched") or False
    return torch.stack(squares)[:, None] / 127.5 - 1, table


def _read_metadata(path):
    if not path.is_file():
        raise DiffEchoError(
            f"{path}: missing; `sample` writes it last: run it again to finish the set"
        )
    table = pd.read_csv(path, keep_default_na=False)
    lacking = sorted(set(METADATA) - set(table.columns))
    if lacking or table.empty:
        found = f"lacks the columns {lacking}" if lacking else "no rows"
        raise DiffEchoError(f"{path}: {found}; sample again")
    pairs = dict.fromkeys(zip(table["view"], table["phase"], strict=True))
    unknown = [pair for pair in pairs if pair not in camus.CLASSES]
    if unknown:
        raise DiffEchoError(f"{path}: view and phase {unknown}, known are {camus.CLASSES}")
    return table


def _read_grey(path):
    """(H, W) uint8 pixels of a picture or label map that metadata.csv names."""
    try:
        with Image.open(path) as picture:
            mode, pixels = picture.mode, np.asarray(picture)
    except OSError as error:
        raise DiffEchoError(
            f"{path}: named in metadata.csv, missing or unreadable ({error}); copy it there, or sample "
            "again"
        ) from None
    if mode != "L":
        raise DiffEchoError(f"{path}: mode {mode}, expected 8-bit grey (L); convert it")
    return pixels


def read_frames(folder, side=None):
    """A synthetic set as `data.Frames`, its label maps all background where it has none.

    The table has view, phase, prompt and seed; each image is a patient of its own. side and errors as in
    `read`.
    """
    images, table = read(folder, side)
    masks = read_label_maps(folder, table, images.shape[-1])
    if masks is None:
        masks = torch.zeros(images[:, 0].shape, dtype=torch.uint8)
    patients = [f"{Path(folder).name}/{name}" for name in table["file_name"]]
    return data.Frames(images, masks, table.assign(patient=patients))


def read_label_maps(folder, table, side):
    """(N, side, side) uint8 label maps of a synthetic set's table, None if it was drawn without.

    Raises DiffEchoError for a map that is missing, unreadable or holds anything but labels 0 to 3.
    """
    if not table["label_map"].astype(bool).all():
        return None
    maps = []
    for name in table["label_map"]:
        mask = _read_grey(Path(folder) / name)
        if mask.max() > 3:
            raise DiffEchoError(
                f"{Path(folder) / name}: no label map, with values up to {mask.max()}; expected labels "
                "0 to 3"
            )
        maps.append(data.to_square(mask, mask, (1.0, 1.0), side)[1])
    return torch.stack(maps)


def own_side(folder):
    """Pixels of the longer side of a synthetic set's images."""
    return max(_read_grey(next(Path(folder).glob("images/*.png"))).shape)


def read_settings(folder):
    """The settings in a synthetic set's dataset.json; {} for a folder that has none."""
    path = Path(folder) / "dataset.json"
    return files.read_json(path, _REMEDY).get("settings", {}) if path.is_file() else {}


def digest(generator):
    """Sixteen hexadecimal digits that change with any weight of the generator, and with its dials."""
    dials = [dict(generator.scheduler.config), getattr(generator.denoiser, "strength", 1.0)]
    dials += [generator.null] if generator.null != "words" else []
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
