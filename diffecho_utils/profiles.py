"""Sizes and budgets, one row a profile: the same code runs all of them.

Every chapter. smoke: tests, minutes for everything. cpu: laptops and the default book. gpu: one GPU.
paper: Stable Diffusion's own networks at 512 px.
"""

from dataclasses import dataclass, replace

from diffecho_utils import DiffEchoError


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one network is trained (`training.fit`)."""

    steps: int
    batch: int  # of one process; the optimiser sees batch x accumulation x processes
    learning_rate: float
    schedule: str = "cosine"  # or "constant"; both after a linear warm-up
    warmup: int = 50
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.999
    accumulation: int = 1
    save_every: int = 250


@dataclass(frozen=True)
class Profile:
    """One row of the table below."""

    name: str
    side: int  # image side, pixels
    patients: int | None  # patients used of each split; None: all
    phantom_patients: int
    latent_channels: int
    autoencoder_channels: tuple[int, ...]
    crop: int  # side of the autoencoder's training crops, pixels
    unet_channels: tuple[int, ...]
    jittered_views: int  # cached latents of each frame: one as it is, the others jittered
    autoencoder: Recipe  # first stage: reconstruction
    texture: Recipe  # second stage: decoder against a discriminator
    unconditional: Recipe
    live_steps: int  # training steps that a chapter runs while you read
    samples: int  # images that a chapter generates for its figures and metrics
    sampling_steps: int
    phantom_seed: int = 2024


_CPU = Profile(
    name="cpu",
    side=128,
    patients=None,
    phantom_patients=60,
    latent_channels=4,
    autoencoder_channels=(24, 48, 64, 64),
    crop=64,
    unet_channels=(64, 96, 96),
    jittered_views=4,
    autoencoder=Recipe(steps=1200, batch=16, learning_rate=1e-3, ema=0.99),
    texture=Recipe(steps=700, batch=12, learning_rate=5e-4, ema=0.99),
    unconditional=Recipe(steps=2000, batch=32, learning_rate=5e-4, ema=0.998),
    live_steps=60,
    samples=200,
    sampling_steps=20,
)

PROFILES = {
    "smoke": replace(
        _CPU,
        name="smoke",
        side=64,
        patients=6,
        phantom_patients=20,
        autoencoder_channels=(8, 8, 16, 16),
        unet_channels=(16, 32),
        jittered_views=1,
        autoencoder=Recipe(steps=4, batch=4, learning_rate=1e-3, warmup=1, save_every=2),
        texture=Recipe(steps=4, batch=4, learning_rate=1e-4, warmup=1, save_every=2),
        unconditional=Recipe(steps=4, batch=4, learning_rate=1e-3, warmup=1, save_every=2),
        live_steps=4,
        samples=16,
        sampling_steps=4,
    ),
    "cpu": _CPU,
    "gpu": replace(
        _CPU,
        name="gpu",
        side=256,
        autoencoder_channels=(64, 128, 128, 128),
        crop=128,
        unet_channels=(128, 256, 384),
        jittered_views=16,
        autoencoder=Recipe(steps=6000, batch=32, learning_rate=5e-4),
        texture=Recipe(steps=4000, batch=32, learning_rate=2e-4),
        unconditional=Recipe(steps=20000, batch=64, learning_rate=2e-4, ema=0.9995),
        live_steps=500,
        samples=1000,
    ),
    "paper": replace(
        _CPU,
        name="paper",
        side=512,
        autoencoder_channels=(128, 256, 512, 512),
        crop=256,
        unet_channels=(320, 640, 1280, 1280),
        jittered_views=16,
        autoencoder=Recipe(steps=50000, batch=8, learning_rate=1e-4),
        texture=Recipe(steps=50000, batch=8, learning_rate=1e-4),
        unconditional=Recipe(steps=45000, batch=16, learning_rate=1e-4, warmup=500, ema=0.9999),
        live_steps=1000,
        samples=2000,
        sampling_steps=1000,
    ),
}


def get(name):
    """The profile of this name; DiffEchoError names those there are."""
    if name not in PROFILES:
        raise DiffEchoError(f"no profile {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]
