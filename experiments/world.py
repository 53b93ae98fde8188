"""What experiments share: a folder's frames, the shipped networks that look at them, drawing."""

import hashlib
import json
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from diffusers import PNDMScheduler
from filelock import FileLock

from diffecho_utils import (
    assets,
    camus,
    checkpoints,
    data,
    downstream,
    files,
    metrics,
    models,
    phantom,
    profiles,
    sampling,
    synthetic,
)

SOLVERS = sampling.SOLVERS | {"PNDM": PNDMScheduler}
QUIET = {"say": lambda line: None}  # to trainings
kept = lru_cache(maxsize=None)  # what is loaded or made once


class World:
    """A CAMUS folder (None: the profile's phantom) at a profile, and the networks shipped for CAMUS."""

    def __init__(self, root, profile, out=None):
        self.profile = profiles.get(profile)
        self.table = camus.read_table(root or phantom_folder(self.profile))
        self.name = self.table.attrs["world"]
        self.out = out or assets.root() / "data" / "results" / self.name / profile

    @kept
    def digest(self, used=None):
        """A hash of what lies at a path, or of a shipped network and what it builds on; None: of the frames."""
        content = hashlib.sha256(self.name.encode())
        if used is None:
            content.update(self.table[["patient", "view", "phase", "split"]].to_csv().encode())
            paths = map(Path, [*self.table["image"], *self.table["label_map"]])
            content.update(str([path.stat().st_size for path in paths]).encode())
            return content.hexdigest()
        place = used if isinstance(used, Path) else assets.checkpoint("camus", used)
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.is_file() and path.suffix != ".md":
                content.update(path.read_bytes())
        if (place / "training.json").is_file():
            for name in checkpoints.read_training(place).get("needs", {}):
                content.update(self.digest(checkpoints.needed(place, name)).encode())
        return content.hexdigest()

    @cached_property
    def judges(self):
        """[segmenter, classifier]."""
        folders = [assets.checkpoint("camus", name) for name in ("segmenter", "classifier")]
        return [checkpoints.load_network(folder).to(models.device()) for folder in folders]

    @kept
    def generator(self, model):
        return checkpoints.load_generator(assets.checkpoint("camus", model)).to(models.device())

    @cached_property
    def vae(self):
        """The autoencoder to encode with: a generator's own would draw otherwise (in the last digit) after it."""
        folder = assets.checkpoint("camus", "autoencoder")
        return checkpoints.load_autoencoder(folder).to(models.device())

    @cached_property
    def see(self):
        """{encoder: images -> (N, D)}."""
        clip = checkpoints.load_clip(assets.checkpoint("camus", "clip"))[0].to(models.device())
        return {
            "classifier": lambda images: metrics.network_features(self.judges[1], images),
            "autoencoder": lambda images: metrics.features(self.vae, images),
            "clip": lambda images: metrics.clip_features(clip, images),
            "latents": lambda images: data.encode(self.vae, images).flatten(1).numpy(),
        }

    @kept
    def seen(self, encoder, split):
        """What an encoder sees in the frames of a split: (N, D)."""
        return self.see[encoder](self.frames(split).images)

    @kept
    def frames(self, split=None, like=None):
        """Frames of a split (None: all) in the geometry of `like`, by default the judges'."""
        return data.open_frames(self.table, split, like or self.judges[0])

    def drawn(self, model, split, seed):
        """One image for each frame of a split, rounded to 8 bits and kept in _build under what fixes it."""
        generator, frames = self.generator(model), self.frames(split)
        steps, prompts = self.profile.sampling_steps, sampling.told("text", frames)["prompts"]
        plan = frames.table.assign(prompt=prompts)[["view", "phase", "prompt"]]
        key = [self.name, synthetic.digest(generator), generator.guidance, steps, seed]
        key.append(synthetic.plan_digest(plan, frames.masks))

        def make():
            images = draw(generator, frames, seed + np.arange(len(frames)), steps)
            return {"images": ((images + 1) * 127.5).round().byte()}

        return cached(f"drawn-{model}", key, make)["images"].float() / 127.5 - 1


def phantom_folder(profile):
    """The default phantom of a profile, written unless there."""
    root = assets.workspace() / f"phantom-{profile.name}"
    return phantom.ensure(root, patients=profile.phantom_patients, seed=profile.phantom_seed)


def cached(name, key, make):
    """`make()`'s tensors, kept in _build/cache; one process makes them, the others wait."""
    folder = assets.workspace() / "cache"
    folder.mkdir(exist_ok=True)
    digits = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    with FileLock(folder / f"{name}-{digits}.lock"):
        return files.cached(folder, name, key, make)


def draw(generator, frames, seeds, steps, solver="DPM-Solver++", spacing=None, **dials):
    """One image for each frame, of which the generator is told what it asks for: (N, 1, S, S).

    spacing: of the timesteps; dials: guidance, guidance_interval, other prompts.
    """
    spaced = {"timestep_spacing": spacing} if spacing else {}
    scheduler = SOLVERS[solver].from_config(generator.scheduler.config, **spaced)
    dials = sampling.told(generator.model, frames) | dials
    return sampling.sample(generator, seeds, steps, scheduler=scheduler, **dials)


def strengthened(generator, strength, **changes):
    """A text + segmentation generator whose ControlNet counts `strength` times; changes: other fields."""
    parts = generator.denoiser
    denoiser = models.TextSegmentationGuided(parts.unet, parts.controlnet, strength).eval()
    return replace(generator, denoiser=denoiser, **changes)


def patients(frames):
    return frames.table["patient"].to_numpy()


def thinned(frames, step):
    """(N,) bool: the frames of every step-th patient. (Every step-th frame would be of one phase alone.)"""
    owners = patients(frames)
    return np.isin(owners, list(dict.fromkeys(owners))[::step])


def dice_of(segmenter, images, frames):
    """Dice of what a segmenter reads in images with the frames' label maps: (N, 3)."""
    return downstream.dice(downstream.segment(segmenter, images), frames.masks)


def by_structure(values):
    """{structure: value} of one value, or a column of values, each."""
    return dict(zip(downstream.STRUCTURES, np.asarray(values).T, strict=True))


def gathered(runs):
    """Mean, lowest and highest of the runs' numbers, in the nesting of one run."""
    if isinstance(runs[0], dict):
        return {name: gathered([run[name] for run in runs]) for name in runs[0]}
    numbers = np.array(runs, dtype=float)
    return numbers.mean(), numbers.min(), numbers.max()
