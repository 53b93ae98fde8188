"""The networks: build them for a profile, save and load them as standard diffusers folders.

Chapters 02 and 03. Everything here is a stock class, so `AutoencoderKL.from_pretrained(folder)` and
its like load the same folders without this package.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from diffecho_utils import DiffEchoError, camus

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Generator:
    """What sampling needs: a denoiser, the noise schedule it was trained on, and the autoencoder."""

    unet: UNet2DModel
    scheduler: DDPMScheduler
    vae: AutoencoderKL

    @property
    def latent_shape(self):
        """(C, h, w) of one latent."""
        config = self.unet.config
        return (config.in_channels, config.sample_size, config.sample_size)


def build_autoencoder(profile):
    """AutoencoderKL, grey-scale in and out, one halving less than it has levels (factor 8 with four).

    No attention in the middle: the network stays fully convolutional, so that what is trained on
    crops works on whole frames.
    """
    channels = profile.autoencoder_channels
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=profile.latent_channels,
        norm_num_groups=8,
        sample_size=profile.side,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def build_discriminator(channels=(32, 64, 96)):
    """Patch discriminator with spectral normalisation: (N, 2, H, W) -> (N, 1, H/8, W/8) logits."""
    layers, inputs = [], 2
    for outputs in channels:
        layers += [spectral_norm(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.2)]
        inputs = outputs
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(inputs, 1, 3, 1, 1)))


def build_unet(profile):
    """UNet2DModel on latents, told the class (view and phase) beside the timestep.

    The paper trains one model for each of the four classes; here four models share their weights and
    a learned class embedding, added to the timestep's, tells them apart.
    """
    channels = profile.unet_channels
    attention = len(channels) - 1  # every level but the first
    return UNet2DModel(
        sample_size=profile.side // autoencoder_factor(profile),
        in_channels=profile.latent_channels,
        out_channels=profile.latent_channels,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * attention,
        up_block_types=("AttnUpBlock2D",) * attention + ("UpBlock2D",),
        layers_per_block=2,
        norm_num_groups=16,
        attention_head_dim=16,
        num_class_embeds=len(camus.CLASSES),
    )


def build_scheduler():
    """Stable Diffusion's noise schedule, with v-prediction (Salimans and Ho 2022)."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )


def autoencoder_factor(profile):
    """Pixels of the image side for one of the latent side."""
    return 2 ** (len(profile.autoencoder_channels) - 1)


def count_parameters(module):
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def save_autoencoder(vae, folder, training):
    """Write the autoencoder as a diffusers folder, half precision, with `training` as training.json."""
    _replace_folder(folder, lambda beside: _save_half(vae, beside), training)


def save_unconditional(unet, folder, autoencoder, training):
    """Write unet/ and scheduler/ of the unconditional generator, and which autoencoder it belongs to.

    `autoencoder` is that checkpoint's folder; its path relative to `folder` and the SHA-256 of its
    weights go to training.json.
    """

    def write(beside):
        _save_half(unet, beside / "unet")
        build_scheduler().save_pretrained(beside / "scheduler")

    reference = {
        "path": os.path.relpath(Path(autoencoder).resolve(), Path(folder).resolve()),
        "sha256": _sha256(Path(autoencoder) / WEIGHTS),
    }
    _replace_folder(folder, write, training | {"autoencoder": reference})


def load_autoencoder(folder):
    """The AutoencoderKL in `folder`, float32, in evaluation mode.

    Raises DiffEchoError for a missing, half-written or other network's folder.
    """
    return _load(AutoencoderKL, folder)


def load_unconditional(folder):
    """The unconditional `Generator` in `folder`, with the autoencoder that it was trained with."""
    folder = Path(folder)
    unet = _load(UNet2DModel, folder / "unet")
    reference = read_training(folder).get("autoencoder")
    if not reference:
        raise DiffEchoError(f"{folder}: training.json names no autoencoder; train or copy it again")
    autoencoder = Path(os.path.normpath(folder.resolve() / reference["path"]))
    vae = load_autoencoder(autoencoder)
    if _sha256(autoencoder / WEIGHTS) != reference["sha256"]:
        raise DiffEchoError(
            f"{autoencoder}: not the autoencoder that {folder} was trained with (its SHA-256 differs); "
            "restore that one, or train the generator again"
        )
    return Generator(unet, DDPMScheduler.from_pretrained(folder / "scheduler"), vae)


def read_training(folder):
    """The checkpoint's training.json: how, on what, for how long it was trained."""
    path = Path(folder) / "training.json"
    if not path.is_file():
        raise DiffEchoError(f"{path}: missing; is {folder} a checkpoint that `train` wrote?")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DiffEchoError(f"{path}: half-written ({error}); train or copy it again") from None


def _load(network, folder):
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise DiffEchoError(
            f"{folder}: no config.json, so no checkpoint; pass a folder `train` wrote"
        )
    try:
        found = json.loads(config.read_text()).get("_class_name")
    except ValueError as error:
        raise DiffEchoError(f"{config}: half-written ({error}); train or copy it again") from None
    if found != network.__name__:
        raise DiffEchoError(f"{folder}: holds a {found}, expected a {network.__name__}")
    try:
        with safe_open(folder / WEIGHTS, "pt") as weights:
            stored = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
    except (OSError, SafetensorError) as error:
        raise DiffEchoError(
            f"{folder / WEIGHTS}: half-written or missing ({error}); copy it again"
        ) from None
    model = network.from_config(network.load_config(folder))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if stored != wanted:
        odd = sorted(set(stored.items()) ^ set(wanted.items()))[0][0]
        raise DiffEchoError(
            f"{folder}: weights and config.json describe different architectures (first at {odd!r}: "
            f"{stored.get(odd)} stored, {wanted.get(odd)} expected); keep both files of one training"
        )
    model = network.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    return model.eval()


def _save_half(model, folder):
    """Save in half precision without changing `model` itself."""
    half = type(model).from_config(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder)


def _replace_folder(folder, write, training):
    """Write a checkpoint's files beside `folder`, then move them in; other files there stay."""
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    write(beside)
    (beside / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(beside.iterdir(), key=lambda p: p.name == "training.json"):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    beside.rmdir()


def _sha256(path):
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise DiffEchoError(f"{path}: unreadable ({error}); copy the checkpoint again") from None
