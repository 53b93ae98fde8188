"""Training images a second: cached latents and prompt states against the loop of the usual example scripts.

Both loops train the same networks (random weights: only time is measured) on the same phantom frames, with the
same batch, on the same machine, in turns. The usual one reads and decodes image files, transforms them, and
encodes images and prompts in every step, with a worker process to read ahead; ours does all of that once
(`data.latent_views`, `data.prompt_table`) and then trains; what that one time costs is shown. 3 minutes on two cores.
"""

import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from world import QUIET

from diffecho_utils import (
    camus,
    checkpoints,
    data,
    models,
    objectives,
    profiles,
    results,
    synthetic,
    training,
)

WORLD, SEEDS, SPLIT = "phantom", [], None


def rows(world, steps=8, batch=16, repeats=3):
    settings = {"steps": steps, "batch": batch, "repeats": repeats}
    return {"training_speed": settings | {"machine": results.hardware()}}


def compute(world, steps, batch, repeats, machine):
    profile = world.profile
    frames = data.load_frames(camus.select(world.table, patients=16), profile)
    vae, runs = models.build_autoencoder(profile).eval().to(models.device()), []
    with tempfile.TemporaryDirectory() as folder:
        brief = profiles.adapt(profile, "clip", steps=[1], batch=4)
        training.train("clip", frames, brief, Path(folder) / "clip", **QUIET)
        encode_text = checkpoints.load_text_encoder(Path(folder) / "clip")
        started = time.perf_counter()
        views = data.latent_views(vae, frames, 1)
        texts, ids = data.prompt_table(frames, ("clinical",))
        states = encode_text(texts)
        once = time.perf_counter() - started
        for i, (image, mask) in enumerate(zip(frames.images, frames.masks, strict=True)):
            synthetic.save_image(image, Path(folder) / f"image{i}.png")
            synthetic.save_grey(mask.numpy(), Path(folder) / f"mask{i}.png")
        order = [i % len(frames) for i in range((steps + 2) * batch * 2)]  # read ahead to the end
        reader = partial(read, Path(folder), profile.side)
        loader = DataLoader(order, batch, num_workers=1, collate_fn=reader)
        encoders = vae, encode_text, [texts[i] for i in ids[:, 0]]
        for model in ("text", "text-seg"):
            tensors = {"latents": views["latents"], "prompts": ids}
            if model == "text-seg":
                tensors["masks"] = views["masks"]
            for _ in range(repeats):
                usual = usual_loop(built(model, profile), *encoders, loader, steps)
                ours = our_loop(built(model, profile), tensors, states, steps, batch)
                speeds = {"usual": steps * batch / usual, "ours": steps * batch / ours}
                runs.append({"model": model} | speeds | {"ratio": usual / ours})
    return {"runs": runs, "once": once, "frames": len(frames)}


def read(folder, side, rows):
    """A batch of a folder's PNGs as an example script reads it: decode, resize, normalise, one by one."""
    parts = {"image": [], "mask": []}
    for row in rows:
        for kind, way in (("image", Image.BILINEAR), ("mask", Image.NEAREST)):
            with Image.open(folder / f"{kind}{row}.png") as picture:
                parts[kind].append(np.array(picture.resize((side, side), way)))
    images, masks = (torch.from_numpy(np.stack(pictures)) for pictures in parts.values())
    return images[:, None].float() / 127.5 - 1, masks, torch.tensor(rows)


def built(model, profile):
    unet = models.build_text_unet(profile)
    if model == "text":
        return models.TextGuided(unet)
    return models.TextSegmentationGuided(unet, models.build_controlnet(unet))


def usual_loop(denoiser, vae, encode_text, texts, loader, steps):
    """Seconds of `steps` training steps in the shape of diffusers' example scripts."""
    scheduler, device = models.build_scheduler(), models.device()
    for network in (denoiser, vae, encode_text.model):
        network.to(device)
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batches, started = iter(loader), None
    for step in range(steps + 2):
        if step == 2:  # the first steps are slow everywhere
            started = time.perf_counter()
        images, masks, rows = (tensor.to(device) for tensor in next(batches))
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
            text = encode_text([texts[i] for i in rows])
        noise, timesteps = (
            torch.randn_like(latents),
            torch.randint(1000, (len(rows),), device=device),
        )
        noisy, given = scheduler.add_noise(latents, noise, timesteps), {"text": text}
        if isinstance(denoiser, models.TextSegmentationGuided):
            given["masks"] = masks
        target = scheduler.get_velocity(latents, noise, timesteps)
        F.mse_loss(denoiser(noisy, timesteps, **given), target).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def our_loop(denoiser, tensors, states, steps, batch):
    """Seconds of `steps` steps of `training.fit` on cached tensors."""
    recipe = profiles.Recipe(steps=steps, batch=batch, learning_rate=1e-4, warmup=1)
    objective = objectives.DiffusionObjective(denoiser, models.build_scheduler(), states)
    training.fit(objective, tensors, replace(recipe, steps=2), None, **QUIET)
    started = time.perf_counter()
    training.fit(objective, tensors, recipe, None, **QUIET)
    return time.perf_counter() - started


def collect(world, found):
    values = found["training_speed"]
    table = pd.DataFrame(values["runs"]).groupby("model", sort=False).agg(["min", "median", "max"])
    print(f"images a second, profile {world.profile.name}\n{table.round(2).to_string()}")
    print(f"encoding {values['frames']} frames and their prompts once: {values['once']:.1f} s")
    return {}
