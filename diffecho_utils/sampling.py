"""From noise to echocardiograms: solvers, guidance, and drawing with them.

Chapters 03 to 07.
"""

import inspect

import diffusers
import numpy as np
import torch

from diffecho_utils import DiffEchoError, camus, data, prompts

# What each generator is told.
CONDITIONS = {
    "unconditional": {"classes"},
    "text": {"prompts"},
    "text-seg": {"prompts", "masks"},
    "sdm": {"masks"},
}

# The template of `prompts.make` that is drawn with. The paper's text + segmentation model is not told the phase
# ("paper-seg"); the map tells it, but told in words as well it shows more often (chapter 05).
DRAWING_PROMPTS = "paper"

# Chapter 07 writes each of them by hand; build one by `.from_config(generator.scheduler.config)`.
SOLVERS = {
    "DDPM": diffusers.DDPMScheduler,
    "DDIM": diffusers.DDIMScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
}


@torch.no_grad()
def sample(
    generator,
    seeds,
    steps,
    *,
    guidance=None,
    guidance_interval=None,
    scheduler=None,
    start=None,
    batch=50,
    progress=None,
    decoded=True,
    **conditions,
):
    """Draw one image for each seed: (N, 1, H, W) float32 in [-1, 1].

    generator: `checkpoints.Generator`; seeds: N integers, each of which fixes its image's noise whatever
    the batch; conditions as in `CONDITIONS`: classes, N indices into `camus.CLASSES`; prompts, N
    texts; masks, (N, H, W) uint8 label maps. `guidance` weighs the condition against the null
    condition (Ho and Salimans 2022); 1 leaves it as trained, None is the generator's own;
    `guidance_interval`, (low, high), keeps it to those timesteps, both included (Kynkaanniemi et al. 2024).
    `scheduler` is any diffusers scheduler built from the generator's configuration (one that puts noise in
    draws it from each image's own stream, if its `step` takes a generator); the default, DPM-Solver++, needs
    about 20 steps. `start`, (images, timestep): pictures to begin with in place of noise, noised to the first of
    the steps at or below the timestep (Meng et al. 2022). decoded: False leaves the latents as they
    are, (N, C, h, w). `progress(done, total, "images")` is called after each batch. Raises DiffEchoError
    for conditions that are missing, too many or of the wrong size, and for an empty interval.
    """
    guidance = generator.guidance if guidance is None else guidance
    low, high = check(generator, len(seeds), guidance, guidance_interval, conditions)
    if scheduler is None:
        scheduler = SOLVERS["DPM-Solver++"].from_config(generator.scheduler.config)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    device = next(generator.denoiser.parameters()).device
    images = []
    for first in range(0, len(seeds), batch):
        part = slice(first, first + batch)
        streams = _streams(seeds[part])
        fresh = {"generator": streams} if draws else {}
        given, null = arguments(
            generator, device, {name: values[part] for name, values in conditions.items()}
        )
        scheduler.set_timesteps(steps, device=device)
        noise = _noise(streams, generator.latent_shape).to(device)
        pictures = start and (start[0][part], start[1])
        latents, timesteps = _begun(generator, scheduler, noise, pictures)
        for timestep in timesteps:
            inputs = scheduler.scale_model_input(latents, timestep)
            times = timestep.expand(len(inputs)).to(device)
            prediction = generator.denoiser(inputs, times, **given)
            if guidance != 1 and low <= timestep <= high:
                unguided = generator.denoiser(inputs, times, **null)
                prediction = unguided + guidance * (prediction - unguided)
            latents = scheduler.step(prediction, timestep, latents, **fresh).prev_sample
        images.append(data.decode(generator.vae, latents) if decoded else latents.cpu())
        if progress:
            progress(min(first + batch, len(seeds)), len(seeds), "images")
    return torch.cat(images)


def _begun(generator, scheduler, noise, start):
    """(latents, timesteps) of a walk from noise, or from pictures: start, (images, timestep)."""
    if not start:
        return noise * scheduler.init_noise_sigma, scheduler.timesteps
    timesteps = scheduler.timesteps[scheduler.timesteps <= start[1]]
    if not len(timesteps):
        raise DiffEchoError(
            f"start at timestep {start[1]}: with {len(scheduler.timesteps)} steps the lowest step is "
            f"{scheduler.timesteps[-1]:g}; begin there or higher, or take more steps"
        )
    latents = data.encode(generator.vae, start[0]).to(noise.device)
    return scheduler.add_noise(latents, noise, timesteps[:1].expand(len(noise))), timesteps


def check(generator, n, guidance, interval, conditions):
    """The guidance interval (low, high); DiffEchoError where `sample` could not draw n images as asked."""
    wanted, model = CONDITIONS[generator.model], generator.model
    if set(conditions) != wanted:
        raise DiffEchoError(
            f"the {model} generator is told {sorted(wanted)}, given {sorted(conditions)}"
        )
    for name, values in conditions.items():
        if len(values) != n:
            raise DiffEchoError(f"{len(values)} {name} for {n} seeds; give one of each an image")
    untrained = set(np.asarray(conditions.get("classes", [])).tolist()) - set(generator.classes)
    if untrained:
        names = [camus.CLASS_NAMES[index] for index in sorted(untrained)]
        raise DiffEchoError(f"the generator was trained without frames of {', '.join(names)}")
    if guidance != 1 and model == "unconditional" and generator.denoiser.shared is None:
        raise DiffEchoError(
            "this unconditional generator has no network of all classes, so no null condition; leave "
            "guidance at 1, or train it with the stage `shared`"
        )
    sides = (generator.side, generator.side)
    if "masks" in conditions and tuple(conditions["masks"].shape[1:]) != sides:
        raise DiffEchoError(
            f"label maps of {tuple(conditions['masks'].shape[1:])} pixels for images of {sides}; "
            "load them in the generator's geometry (`data.load_frames(rows, generator)`)"
        )
    last = generator.scheduler.config.num_train_timesteps - 1
    low, high = interval or (0, last)
    if not 0 <= low <= high <= last:
        raise DiffEchoError(
            f"guidance interval {low} to {high}: give the lower timestep first, both from 0 (the "
            f"picture) to {last} (noise)"
        )
    return low, high


def told(model, frames):
    """What a generator of `model` is told of `frames` (data.Frames): the conditions of `sample`."""
    known = {"classes": frames.classes, "masks": frames.masks}
    known["prompts"] = prompts.make(frames.table, DRAWING_PROMPTS)
    return {name: known[name] for name in CONDITIONS[model]}


def initial_noise(seeds, shape):
    """Standard normal noise, one draw a seed on the CPU: (N, *shape), the same on every device."""
    return _noise(_streams(seeds), shape)


def pairs(generator, seeds, steps, **how):
    """What reflow learns from: the noise of each seed and the picture that the generator makes of it.

    how: as `sample`'s. Returns {"latents", "noise"}, each (N, C, h, w). The noise is the one with which the
    picture, mixed at the last timestep, gives what the solver began with: what DDIM would hold to be its noise.
    """
    latents = sample(generator, seeds, steps, decoded=False, **how)
    begun = initial_noise(seeds, generator.latent_shape)
    alpha_bar = generator.scheduler.alphas_cumprod[-1]
    return {
        "latents": latents,
        "noise": (begun - alpha_bar**0.5 * latents) / (1 - alpha_bar) ** 0.5,
    }


def _streams(seeds):
    """A random generator for each seed: its first draw is the image's initial noise."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _noise(streams, shape):
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams])


def arguments(generator, device, conditions):
    """The denoiser's arguments for these conditions, and for the null condition."""
    given, null = {}, {}
    if "classes" in conditions:
        given["classes"] = torch.as_tensor(conditions["classes"], device=device)
        null["classes"] = torch.full_like(given["classes"], -1)
    if "prompts" in conditions:
        texts = list(conditions["prompts"])
        opposite = generator.null == "opposite"
        against = [prompts.opposite(text) if opposite else "" for text in texts]
        given["text"], null["text"] = generator.text(texts), generator.text(against)
    if "masks" in conditions:
        given["masks"] = null["masks"] = torch.as_tensor(conditions["masks"]).to(device)
        if "prompts" not in conditions or generator.null != "words":
            null["unlabelled"] = torch.ones(len(given["masks"]), dtype=torch.bool, device=device)
    return given, null
