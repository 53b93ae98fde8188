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
    beta1: float = 0.9  # AdamW's first momentum; adversarial training wants less
    bf16: bool = True  # mixed precision where the device has it
    accumulation: int = 1
    save_every: int = 250
    prediction: str = "v_prediction"  # what a denoiser answers with; or "epsilon", the noise
    snr_gamma: float | None = (
        None  # min-SNR weights (Hang et al. 2023); None: timesteps weigh alike
    )


@dataclass(frozen=True)
class Profile:
    """One row of the table below."""

    name: str
    side: int  # image side, pixels
    stretched: bool  # frames to the square, or padded to it
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
    autoencoder: Recipe  # first stage: reconstruction
    texture: Recipe  # second stage: decoder against a discriminator
    clip: Recipe
    unconditional: Recipe  # of each of the four networks
    text: Recipe
    text_seg: Recipe
    sdm: Recipe
    segmentation: Recipe
    classification: Recipe
    live_steps: int  # training steps that a chapter runs while you read
    samples: int  # images that a chapter generates for its figures and metrics
    sampling_steps: int
    phantom_seed: int = 2024
    pretrained: str | None = None  # Stable Diffusion's weights: a local folder or a name on the Hub
    unconditional_pixels: int | None = None  # side of unconditional models that diffuse pixels


_CPU = Profile(
    name="cpu",
    side=128,
    stretched=False,
    patients=None,
    phantom_patients=60,
    latent_channels=16,
    autoencoder_channels=(24, 48, 64, 64),
    crop=64,
    unconditional_channels=(32, 48, 64),
    unet_channels=(64, 64, 96),
    sdm_channels=(48, 80, 80),
    clip_width=128,
    clip_layers=3,
    segmenter_channels=(16, 32, 64, 128),
    classifier_channels=(16, 32, 64, 128),
    jittered_views=4,
    autoencoder=Recipe(steps=1200, batch=16, learning_rate=1e-3, ema=0.99, bf16=False),
    texture=Recipe(steps=700, batch=12, learning_rate=5e-4, ema=0.99, beta1=0.5, bf16=False),
    clip=Recipe(steps=600, batch=64, learning_rate=5e-4, weight_decay=0.1, ema=0.99),
    unconditional=Recipe(steps=1500, batch=32, learning_rate=1e-3, ema=0.998),
    text=Recipe(steps=2000, batch=32, learning_rate=1e-3, ema=0.998),
    text_seg=Recipe(steps=1500, batch=32, learning_rate=1e-3, ema=0.998),
    sdm=Recipe(steps=2000, batch=32, learning_rate=1e-3, ema=0.998),
    segmentation=Recipe(steps=1000, batch=8, learning_rate=4e-3, ema=0.99, weight_decay=1e-4),
    classification=Recipe(steps=800, batch=32, learning_rate=1e-3, ema=0.99, weight_decay=1e-2),
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
        latent_channels=4,
        autoencoder_channels=(8, 8, 16, 16),
        unconditional_channels=(16, 32),
        unet_channels=(16, 32),
        sdm_channels=(16, 32),
        clip_width=32,
        clip_layers=1,
        segmenter_channels=(4, 8, 8),
        classifier_channels=(4, 8, 8, 8),
        jittered_views=1,
        autoencoder=Recipe(steps=4, batch=4, learning_rate=1e-3, warmup=1, save_every=2),
        texture=Recipe(steps=4, batch=4, learning_rate=1e-4, warmup=1, save_every=2),
        **dict.fromkeys(
            ("clip", "unconditional", "text", "text_seg", "sdm", "segmentation", "classification"),
            Recipe(steps=4, batch=4, learning_rate=1e-3, warmup=1, save_every=2),
        ),
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
        unconditional_channels=(64, 128, 192),
        unet_channels=(128, 256, 384),
        sdm_channels=(128, 192, 256),
        clip_width=256,
        clip_layers=4,
        segmenter_channels=(32, 64, 128, 256, 256),
        classifier_channels=(32, 64, 128, 256),
        jittered_views=16,
        autoencoder=Recipe(steps=6000, batch=32, learning_rate=5e-4, bf16=False),
        texture=Recipe(steps=4000, batch=32, learning_rate=2e-4, beta1=0.5, bf16=False),
        clip=Recipe(steps=3000, batch=256, learning_rate=5e-4, weight_decay=0.1, ema=0.99),
        unconditional=Recipe(steps=5000, batch=64, learning_rate=3e-4, ema=0.9995),
        text=Recipe(steps=12000, batch=128, learning_rate=3e-4, ema=0.9995),
        text_seg=Recipe(steps=8000, batch=128, learning_rate=3e-4, ema=0.9995),
        sdm=Recipe(steps=12000, batch=128, learning_rate=3e-4, ema=0.9995),
        segmentation=Recipe(steps=6000, batch=32, learning_rate=1e-3, weight_decay=1e-4),
        classification=Recipe(steps=3000, batch=64, learning_rate=1e-3, weight_decay=1e-2),
        live_steps=500,
        samples=1000,
    ),
    "paper": replace(
        _CPU,
        name="paper",
        side=512,
        latent_channels=4,
        autoencoder_channels=(128, 256, 512, 512),
        crop=256,
        unconditional_channels=(64, 64, 128, 128, 256, 256),
        unet_channels=(320, 640, 1280, 1280),
        sdm_channels=(256, 256, 512, 512),
        clip_width=768,
        clip_layers=12,
        segmenter_channels=(2, 4, 8, 16, 32, 64, 128, 256),
        classifier_channels=(64, 128, 256, 512),
        jittered_views=16,
        pretrained="stable-diffusion-v1-5/stable-diffusion-v1-5",
        unconditional_pixels=128,
        autoencoder=Recipe(steps=50000, batch=8, learning_rate=1e-4, bf16=False),
        texture=Recipe(steps=50000, batch=8, learning_rate=1e-4, bf16=False),
        clip=Recipe(steps=20000, batch=256, learning_rate=1e-4, weight_decay=0.1),
        unconditional=Recipe(
            steps=10000,
            batch=16,
            learning_rate=1e-4,
            warmup=500,
            ema=0.9999,
            prediction="epsilon",
        ),
        text=Recipe(
            steps=35000,
            batch=1,
            accumulation=4,
            learning_rate=1e-5,
            schedule="constant",
            ema=0.9999,
            prediction="epsilon",
        ),
        text_seg=Recipe(
            steps=120000,
            batch=1,
            learning_rate=5e-6,
            schedule="constant",
            ema=0.9999,
            prediction="epsilon",
        ),
        sdm=Recipe(steps=120000, batch=4, learning_rate=1e-4, ema=0.9999, prediction="epsilon"),
        segmentation=Recipe(steps=30000, batch=16, learning_rate=1e-3),
        classification=Recipe(steps=3000, batch=16, learning_rate=1e-3),
        live_steps=1000,
        samples=2000,
        sampling_steps=1000,
    ),
}


# Which rows of a profile are the recipes of a model (`training.MODELS`), stage by stage.
_RECIPES = {"autoencoder": ("autoencoder", "texture"), "text-seg": ("text_seg",)}
_RECIPES |= {"segmenter": ("segmentation",), "classifier": ("classification",)}


def adapt(profile, model, *, steps=None, **changes):
    """The profile with another recipe for `model`, for machines that it was not made for.

    steps: one number a stage; changes: other rows of `Recipe`, of every stage; None: as they are.
    """
    names = _RECIPES.get(model, (model,))
    steps = list(steps or [None] * len(names))
    if len(steps) != len(names):
        raise DiffEchoError(
            f"{model} has {len(names)} stages, given steps for {len(steps)}: {steps}"
        )
    changes = {name: value for name, value in changes.items() if value is not None}
    recipes = {}
    for name, n in zip(names, steps, strict=True):
        recipe = replace(getattr(profile, name), **changes)
        warmup = min(recipe.warmup, (n or recipe.steps) // 4)
        recipes[name] = replace(recipe, steps=n or recipe.steps, warmup=warmup)
    return replace(profile, **recipes)


def narrowed(profile, width):
    """The profile with networks `width` times as wide: weights and time go with about its square.

    Channels are rounded to what the normalisation layers divide by: 8 in the autoencoder, 16 in the
    denoisers, 32 in CLIP.
    """
    parts = {"autoencoder_channels": 8, "clip_width": 32}
    parts |= dict.fromkeys(("unconditional_channels", "unet_channels", "sdm_channels"), 16)
    changed = {}
    for name, multiple in parts.items():
        old = getattr(profile, name)
        widths = old if isinstance(old, tuple) else (old,)
        new = tuple(max(multiple, round(c * width / multiple) * multiple) for c in widths)
        changed[name] = new if isinstance(old, tuple) else new[0]
    return replace(profile, **changed)


def get(name):
    """The profile of this name; DiffEchoError names those there are."""
    if name not in PROFILES:
        raise DiffEchoError(f"no profile {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]
