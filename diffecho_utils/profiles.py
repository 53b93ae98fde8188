"""Sizes and budgets, one column of a table for each profile: the same code runs all of them.

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
    beta1: float = 0.9  # AdamW's first momentum; adversarial training wants less
    bf16: bool = True  # mixed precision where the device has it
    sparing: bool = (
        False  # of a GPU's memory: float16 where it has no bf16, 8-bit Adam where there is one
    )
    accumulation: int = 1
    save_every: int = 250
    prediction: str = "v_prediction"  # what a denoiser answers with; or "epsilon", the noise
    snr_gamma: float | None = None  # min-SNR weights (Hang et al. 2023); None: all timesteps alike


@dataclass(frozen=True)
class Profile:
    """One column of the table below. A recipe bears the name of its stage (`recipes`)."""

    name: str
    side: int  # image side, pixels
    patients: int | None  # patients used of each split; None: all
    phantom_patients: int
    latent_channels: int
    autoencoder_channels: tuple[int, ...]
    crop: int  # side of the autoencoder's training crops, pixels
    unconditional_channels: tuple[int, ...]  # of each of the four networks
    unet_channels: tuple[int, ...]  # of the text model, and so of its ControlNet
    sdm_channels: tuple[int, ...]
    clip_width: int
    clip_layers: int  # of each tower
    segmenter_channels: tuple[int, ...]
    classifier_channels: tuple[int, ...]
    jittered_views: int  # cached latents of each frame: one as it is, the others jittered
    reconstruction: Recipe  # the autoencoder's first stage
    texture: Recipe  # its second: the decoder against a discriminator
    clip: Recipe
    unconditional: Recipe  # of each of the four networks
    text: Recipe
    lora: Recipe  # of a base's text model, instead of `text`
    text_seg: Recipe
    sdm: Recipe
    segmenter: Recipe
    classifier: Recipe
    live_steps: int  # training steps that a chapter runs while you read
    samples: int  # images that a chapter generates for its figures and metrics
    sampling_steps: int
    base: str | None  # a Stable Diffusion 1.x to fine-tune (`base`); None: networks of our own
    unconditional_pixels: int | None  # side of unconditional models that diffuse pixels
    stretched: bool = False  # frames to the square, or padded to it
    phantom_seed: int = 2024


# Models that are trained in more than the one stage of their own name: the recipes, in order.
STAGES = {"autoencoder": ("reconstruction", "texture")}

_MOMENT = Recipe(steps=4, batch=4, learning_rate=1e-3, warmup=1, save_every=2)
_PAPER = Recipe(steps=120000, batch=4, learning_rate=1e-4, ema=0.9999, prediction="epsilon")
_TUNED = replace(_PAPER, batch=1, learning_rate=5e-6, schedule="constant", sparing=True)  # a base
_LORA = replace(_TUNED, steps=2000, batch=4, learning_rate=1e-4, ema=0.999, save_every=100)

_TABLE = {
    "name": ("smoke", "cpu", "gpu", "paper"),
    "side": (64, 128, 256, 512),
    "patients": (6, None, None, None),
    "phantom_patients": (20, 60, 60, 60),
    "latent_channels": (4, 16, 16, 4),
    "crop": (64, 64, 128, 256),
    "jittered_views": (1, 4, 16, 16),
    "live_steps": (4, 60, 500, 1000),
    "samples": (16, 200, 1000, 2000),
    "sampling_steps": (4, 20, 20, 1000),
    "unconditional_pixels": (None, None, None, 128),
    "base": (None, None, None, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "clip_width": (32, 128, 256, 768),
    "clip_layers": (1, 3, 4, 12),
    "autoencoder_channels": (
        (8, 8, 16, 16),
        (24, 48, 64, 64),
        (64, 128, 128, 128),
        (128, 256, 512, 512),
    ),
    "unconditional_channels": (
        (16, 32),
        (32, 48, 64),
        (64, 128, 192),
        (64, 64, 128, 128, 256, 256),
    ),
    "unet_channels": ((16, 32), (64, 64, 96), (128, 256, 384), (320, 640, 1280, 1280)),
    "sdm_channels": ((16, 32), (48, 80, 80), (128, 192, 256), (256, 256, 512, 512)),
    "segmenter_channels": (
        (4, 8, 8),
        (16, 32, 64, 128),
        (32, 64, 128, 256, 256),
        (2, 4, 8, 16, 32, 64, 128, 256),
    ),
    "classifier_channels": (
        (8, 8, 8, 8),  # with 4, oneDNN's stride-2 1x1 convolution crashes on CPUs without AVX-512
        (16, 32, 64, 128),
        (32, 64, 128, 256),
        (64, 128, 256, 512),
    ),
    "reconstruction": (
        _MOMENT,
        Recipe(steps=1200, batch=16, learning_rate=1e-3, ema=0.99, bf16=False),
        Recipe(steps=6000, batch=32, learning_rate=5e-4, bf16=False),
        Recipe(steps=50000, batch=8, learning_rate=1e-4, bf16=False),
    ),
    "texture": (
        replace(_MOMENT, learning_rate=1e-4),
        Recipe(steps=700, batch=12, learning_rate=5e-4, ema=0.99, beta1=0.5, bf16=False),
        Recipe(steps=4000, batch=32, learning_rate=2e-4, beta1=0.5, bf16=False),
        Recipe(steps=50000, batch=8, learning_rate=1e-4, bf16=False),
    ),
    "clip": (
        _MOMENT,
        Recipe(steps=600, batch=64, learning_rate=5e-4, weight_decay=0.1, ema=0.99),
        Recipe(steps=3000, batch=256, learning_rate=5e-4, weight_decay=0.1, ema=0.99),
        Recipe(steps=20000, batch=256, learning_rate=1e-4, weight_decay=0.1),
    ),
    "unconditional": (
        _MOMENT,
        Recipe(steps=1500, batch=32, learning_rate=1e-3, ema=0.998),
        Recipe(steps=5000, batch=64, learning_rate=3e-4, ema=0.9995),
        replace(_PAPER, steps=10000, batch=16, warmup=500),
    ),
    "text": (
        _MOMENT,
        Recipe(steps=2000, batch=32, learning_rate=1e-3, ema=0.998),
        Recipe(steps=12000, batch=128, learning_rate=3e-4, ema=0.9995),
        replace(_TUNED, steps=35000, accumulation=4, learning_rate=1e-5),
    ),
    "lora": (_MOMENT, _LORA, _LORA, _LORA),
    "text_seg": (
        _MOMENT,
        Recipe(steps=1500, batch=32, learning_rate=1e-3, ema=0.998),
        Recipe(steps=8000, batch=128, learning_rate=3e-4, ema=0.9995),
        _TUNED,
    ),
    "sdm": (
        _MOMENT,
        Recipe(steps=2000, batch=32, learning_rate=1e-3, ema=0.998),
        Recipe(steps=12000, batch=128, learning_rate=3e-4, ema=0.9995),
        _PAPER,
    ),
    "segmenter": (
        _MOMENT,
        Recipe(steps=1000, batch=8, learning_rate=4e-3, ema=0.99, weight_decay=1e-4),
        Recipe(steps=6000, batch=32, learning_rate=1e-3, weight_decay=1e-4),
        Recipe(steps=30000, batch=16, learning_rate=1e-3),
    ),
    "classifier": (
        _MOMENT,
        Recipe(steps=800, batch=32, learning_rate=1e-3, ema=0.99, weight_decay=1e-2),
        Recipe(steps=3000, batch=64, learning_rate=1e-3, weight_decay=1e-2),
        Recipe(steps=3000, batch=16, learning_rate=1e-3),
    ),
}
_COLUMNS = [dict(zip(_TABLE, column, strict=True)) for column in zip(*_TABLE.values(), strict=True)]
PROFILES = {column["name"]: Profile(**column) for column in _COLUMNS}


def recipes(profile, model):
    """{stage: recipe} of the stages that `model` (`training.MODELS`) is trained in, in order."""
    stages = STAGES.get(model, (model.replace("-", "_"),))
    return {stage: getattr(profile, stage) for stage in stages}


def adapt(profile, model, *, steps=None, **changes):
    """The profile with other recipes for `model`, for machines that it was not made for.

    steps: one number a stage; changes: other rows of `Recipe`, of every stage; None: as they are.
    """
    found = recipes(profile, model)
    steps = list(steps or [None] * len(found))
    if len(steps) != len(found):
        raise DiffEchoError(
            f"{model} has {len(found)} stages, given steps for {len(steps)}: {steps}"
        )
    changes = {name: value for name, value in changes.items() if value is not None}
    for (stage, recipe), n in zip(found.items(), steps, strict=True):
        recipe = replace(recipe, **changes, steps=n or recipe.steps)
        found[stage] = replace(recipe, warmup=min(recipe.warmup, recipe.steps // 4))
    return replace(profile, **found)


def get(name):
    """The profile of this name; DiffEchoError names those there are."""
    if name not in PROFILES:
        raise DiffEchoError(f"no profile {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]
