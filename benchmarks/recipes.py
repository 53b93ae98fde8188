"""What each recipe of a profile takes on this machine: images a second, memory, minutes.

    python benchmarks/recipes.py [--profile gpu] [--steps 20]     (on a CPU: --profile smoke)

Every network of the profile is trained for some steps of its own batch, with random weights on random
frames: only time and memory are measured. "minutes" is what the whole recipe would take at that speed.
"""

import argparse
import time
from dataclasses import replace

import pandas as pd
import torch

from diffecho_utils import (
    DiffEchoError,
    camus,
    models,
    objectives,
    profiles,
    prompts,
    results,
    training,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="gpu", choices=[*profiles.PROFILES])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    profile = profiles.get(options.profile)
    rows = {}
    for name, (objective, tensors, recipe, networks) in trainings(profile).items():
        rows[name] = measure(objective, tensors, recipe, networks, options.steps)
        print(f"{name}: {rows[name]}", flush=True)
    print(f"{results.hardware()}, profile {profile.name}, {profile.side} pixels")
    print(pd.DataFrame(rows).T.to_string())


def measure(objective, tensors, recipe, networks, steps):
    """Row of the table for one training; an error, such as that of too little memory, in its place."""
    brief = replace(recipe, warmup=1, save_every=10**9)
    on_gpu = torch.cuda.is_available()
    try:
        training.fit(objective, tensors, replace(brief, steps=5), None, progress=str)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        training.fit(objective, tensors, replace(brief, steps=steps), None, progress=str)
    except DiffEchoError as error:
        return {"batch": recipe.batch, "error": str(error).split(";")[0]}
    speed = steps * recipe.batch * recipe.accumulation / (time.perf_counter() - started)
    seen = recipe.steps * recipe.batch * recipe.accumulation * networks
    return {
        "parameters": f"{models.count_parameters(objective.network):,}",
        "batch": recipe.batch,
        "images / s": round(speed, 1),
        "GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if on_gpu else None,
        "recipe / images": f"{seen:,}",
        "recipe / min": round(seen / speed / 60, 1),
    }


def trainings(profile):
    """{name: (objective, tensors, recipe, how many such networks)} of a profile."""
    torch.manual_seed(0)
    n, side = 64, profile.side
    small = side // models.autoencoder_factor(profile)
    images = torch.rand(n, 1, side, side) * 2 - 1
    masks = torch.randint(len(camus.LABELS), (n, side, side), dtype=torch.uint8)
    latents = {"latents": torch.randn(n, profile.latent_channels, small, small)}
    texts = prompts.every()[:3]
    tokenizer = models.build_tokenizer(texts)
    ids = torch.randint(1, 4, (n, 3))
    states = torch.randn(4, models.TOKENS, profile.clip_width)
    vae, unet = models.build_autoencoder(profile), models.build_text_unet(profile)
    control = models.TextSegmentationGuided(unet, models.build_controlnet(unet))
    alone = models.Unconditional([models.build_unconditional(profile)])
    mapped = models.SemanticDiffusion(models.build_sdm(profile))
    text = models.TextGuided(models.build_text_unet(profile))
    scheduler, told = models.build_scheduler(), latents | {"prompts": ids}
    clip = objectives.ContrastiveObjective(
        models.build_clip(profile, tokenizer), models.tokens(tokenizer, ["", *texts])
    )
    first = objectives.ReconstructionObjective(vae, profile.crop)
    discriminator = models.build_discriminator()
    second = objectives.TextureObjective(
        models.build_autoencoder(profile), discriminator, profile.crop
    )
    diffusion = objectives.DiffusionObjective
    return {
        "autoencoder": (first, {"images": images}, profile.autoencoder, 1),
        "autoencoder, texture": (second, {"images": images}, profile.texture, 1),
        "clip": (clip, {"images": images, "masks": masks, "prompts": ids}, profile.clip, 1),
        "unconditional": (
            diffusion(alone, scheduler),
            latents,
            profile.unconditional,
            len(camus.CLASSES),
        ),
        "text": (diffusion(text, scheduler, states), told, profile.text, 1),
        "text-seg": (
            diffusion(control, scheduler, states),
            told | {"masks": masks},
            profile.text_seg,
            1,
        ),
        "sdm": (diffusion(mapped, scheduler), latents | {"masks": masks}, profile.sdm, 1),
    }


if __name__ == "__main__":
    main()
