"""Training images a second: cached latents and prompt states against the loop of the usual example scripts.

    python benchmarks/training_speed.py [--profile cpu] [--steps 8] [--batch 16]     (3 minutes on two cores)

Both loops train the same networks (random weights: only time is measured) on the same phantom frames, with
the same batch, on the same machine, in turns. The usual one reads and decodes image files, transforms them,
and encodes images and prompts in every step, with a worker process to read ahead; ours does all of that once
(`data.latent_views`, `data.prompt_table`) and then trains (`training.fit`); what that one time costs is shown.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from diffecho_utils import (
    assets,
    camus,
    checkpoints,
    data,
    models,
    objectives,
    phantom,
    profiles,
    synthetic,
    training,
)


class ImageFiles(Dataset):
    """A folder of PNGs as an example script reads it: decode, resize, normalise, one by one."""

    def __init__(self, folder, n, side):
        self.folder, self.n, self.side = folder, n, side

    def __len__(self):
        return 10**6  # no epoch ends while the clock runs

    def __getitem__(self, i):
        pictures = []
        for kind, way in (("image", Image.BILINEAR), ("mask", Image.NEAREST)):
            with Image.open(self.folder / f"{kind}{i % self.n}.png") as picture:
                pictures.append(np.array(picture.resize((self.side, self.side), way)))
        image, mask = (torch.from_numpy(picture) for picture in pictures)
        return image[None].float() / 127.5 - 1, mask, i % self.n


def usual_loop(denoiser, vae, encode_text, texts, loader, steps, batch, masked):
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
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (batch,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        given = {"masks": masks} if masked else {}
        loss = F.mse_loss(
            denoiser(noisy, timesteps, text=text, **given),
            scheduler.get_velocity(latents, noise, timesteps),
        )
        loss.backward()
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
    training.fit(objective, tensors, replace(recipe, steps=2), None, progress=lambda _: None)
    started = time.perf_counter()
    training.fit(objective, tensors, recipe, None, progress=lambda _: None)
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    profile = profiles.get(options.profile)
    root = phantom.ensure(
        assets.workspace() / f"phantom-{profile.name}",
        patients=profile.phantom_patients,
        seed=profile.phantom_seed,
    )
    table = camus.select(camus.read_table(root), patients=16)
    frames = data.load_frames(table, profile)
    vae = models.build_autoencoder(profile).eval()
    clip_folder = Path(tempfile.mkdtemp()) / "clip"
    training.train(
        "clip",
        frames,
        profiles.adapt(profile, "clip", steps=[1], batch=4),
        clip_folder,
        progress=str,
    )
    encode_text = checkpoints.TextEncoder(clip_folder)

    started = time.perf_counter()
    views = data.latent_views(vae, frames, 1)
    texts, ids = data.prompt_table(frames, ("clinical",))
    states = encode_text(texts)
    once = time.perf_counter() - started

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (image, mask) in enumerate(zip(frames.images, frames.masks, strict=True)):
            synthetic.save_image(image, Path(folder) / f"image{i}.png")
            Image.fromarray(mask.numpy()).save(Path(folder) / f"mask{i}.png")
        files = ImageFiles(Path(folder), len(frames), profile.side)
        loader = DataLoader(files, batch_size=options.batch, num_workers=1)
        prompts = [texts[i] for i in ids[:, 0]]
        for model in ("text", "text-seg"):
            unet = models.build_text_unet(profile)
            denoiser, tensors = (
                models.TextGuided(unet),
                {"latents": views["latents"], "prompts": ids},
            )
            if model == "text-seg":
                denoiser = models.TextSegmentationGuided(unet, models.build_controlnet(unet))
                tensors["masks"] = views["masks"]
            seen = options.steps * options.batch
            for _ in range(options.repeats):
                masked = model == "text-seg"
                usual = usual_loop(
                    denoiser,
                    vae,
                    encode_text,
                    prompts,
                    loader,
                    options.steps,
                    options.batch,
                    masked,
                )
                ours = our_loop(denoiser, tensors, states, options.steps, options.batch)
                rows.append(
                    {
                        "model": model,
                        "usual": seen / usual,
                        "ours": seen / ours,
                        "ratio": usual / ours,
                    }
                )
    found = pd.DataFrame(rows).groupby("model", sort=False).agg(["min", "median", "max"])
    print(
        f"images a second, profile {profile.name}, batch {options.batch}, {options.repeats} repeats"
    )
    print(found.round(2).to_string())
    print(f"encoding {len(frames)} frames and their prompts once: {once:.1f} s")


if __name__ == "__main__":
    main()
