"""Networks on disk as standard folders, and what comes out of one: a generator, a judge, an encoder.

Chapters 02 to 10. `AutoencoderKL.from_pretrained(folder)` and its like load the same folders without this package.
Beside the weights lies training.json: how, on what and for how long the network was trained, the geometry of its
frames, and which checkpoints it builds on.
"""

import copy
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from diffecho_utils import DiffEchoError, camus, data, models

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLIP_WEIGHTS = "model.safetensors"
MONAI_NETWORKS = ("SPADEDiffusionModelUNet", "UNet", "ResNet")


class TextEncoder:
    """Prompts to token states: the text half of a CLIP checkpoint, on the device it is called for."""

    def __init__(self, clip_folder):
        clip, self.tokenizer = load_clip(clip_folder)
        self.model = clip.text_model

    @torch.no_grad()
    def __call__(self, texts):
        """(N, L, D) float32 last hidden states of N texts, each padded to `TOKENS`; "" is the null prompt."""
        ids = models.tokens(self.tokenizer, texts)
        device = next(self.model.parameters()).device
        return self.model(ids.to(device)).last_hidden_state


@dataclass(frozen=True)
class Generator:
    """What sampling needs: a denoiser, its noise schedule, the autoencoder, and the words' encoder.

    `text` is None for generators that read no prompts, `vae` for those that diffuse pixels.
    `latent_shape` is (C, h, w) of one latent; `guidance` the scale its training.json recommends;
    `stretched` whether its frames were stretched to the square, or padded; `classes` indices into
    `camus.CLASSES` of what it can draw.
    """

    model: str
    denoiser: nn.Module
    scheduler: DDPMScheduler
    vae: AutoencoderKL | None
    latent_shape: tuple[int, int, int]
    text: TextEncoder | None = None
    guidance: float = 1.0
    stretched: bool = False
    classes: tuple[int, ...] = tuple(range(len(camus.CLASSES)))

    @property
    def side(self):
        """Pixels of the side of its images and label maps."""
        halvings = len(self.vae.config.block_out_channels) - 1 if self.vae is not None else 0
        return self.latent_shape[-1] * 2**halvings

    def to(self, device):
        """Move all its networks; returns the generator."""
        for network in (self.denoiser, self.vae, self.text and self.text.model):
            if network is not None:
                network.to(device)
        return self


class Judge(nn.Module):
    """A segmenter or classifier with the geometry of the frames that it learned to read.

    Images (N, 1, H, W) of another size are resized to `side` pixels, and a segmenter's logits back.
    `stretched`: whether its frames were stretched to the square, or padded; `data.load_frames(rows,
    judge)` makes them so.
    """

    def __init__(self, network, side, stretched):
        super().__init__()
        self.network, self.side, self.stretched = network, side, stretched

    def forward(self, images):
        answer = self.network(data.resized(images, self.side))
        if answer.ndim == 4 and answer.shape[-1] != images.shape[-1]:
            answer = F.interpolate(answer, images.shape[-2:], mode="bilinear")
        return answer


def save(parts, folder, training, needs=None):
    """Write a checkpoint: `parts`, pairs of a subfolder and a network, scheduler or tokenizer.

    Networks are kept in half precision; "" is the folder itself; `training` becomes training.json.
    `needs` {name: checkpoint folder} are the checkpoints it was trained with: their relative paths
    and the SHA-256 of their weights are kept there too. Written beside and renamed, so an earlier checkpoint stays whole until then.
    """
    references = {
        name: {
            "path": os.path.relpath(Path(needed).resolve(), Path(folder).resolve()),
            "sha256": weights_digest(needed),
        }
        for name, needed in (needs or {}).items()
    }

    def write(beside):
        for subfolder, part in parts:
            _save_part(part, beside / subfolder)

    _replace_folder(folder, write, training | {"needs": references})


def load_autoencoder(folder):
    """The AutoencoderKL in `folder`, float32, in evaluation mode.

    Raises DiffEchoError for a missing, half-written or other network's folder.
    """
    return _load(AutoencoderKL, folder)


def load_clip(folder):
    """(CLIPModel, CLIPTokenizer) in `folder`; errors as `load_autoencoder`."""
    return _load(CLIPModel, folder), CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def load_network(folder):
    """The segmenter or classifier in `folder`, a `Judge`; errors as `load_autoencoder`."""
    made = read_training(folder)
    if "side" not in made:
        raise DiffEchoError(f"{folder}: training.json names no side of its frames; train it again")
    return Judge(_load(None, folder), made["side"], made.get("stretched", False)).eval()


def load_generator(folder):
    """The `Generator` in `folder`, of whichever model, with the checkpoints it was trained with.

    Raises DiffEchoError where one of those is missing or is not the one of the training.
    """
    folder = Path(folder)
    made = read_training(folder)
    model = made.get("model")
    if model not in models.GENERATORS:
        raise DiffEchoError(
            f"{folder}: a checkpoint of {model!r}, no generator ({models.GENERATORS})"
        )
    base = needed(folder, "text") if model == "text-seg" else folder
    pixels = model == "unconditional" and not made.get("needs")
    vae = None if pixels else load_autoencoder(needed(base, "autoencoder"))
    text, there = None, tuple(range(len(camus.CLASSES)))
    if model == "unconditional":
        trained = made.get("recipes", camus.CLASS_NAMES)
        there = tuple(i for i, name in enumerate(camus.CLASS_NAMES) if name in trained)
        unets = [
            _load(UNet2DModel, folder / name) if index in there else None
            for index, name in enumerate(camus.CLASS_NAMES)
        ]
        denoiser, config = models.Unconditional(unets), unets[there[0]].config
    elif model == "sdm":
        denoiser = models.SemanticDiffusion(_load(None, folder / "unet"))
        config = denoiser.unet.config
    else:
        text = TextEncoder(needed(base, "clip"))
        unet = _load(UNet2DConditionModel, base / "unet")
        config = unet.config
        denoiser = models.TextGuided(unet)
        if model == "text-seg":
            controlnet = _load(ControlNetModel, folder / "controlnet")
            denoiser = models.TextSegmentationGuided(unet, controlnet, made.get("strength", 1.0))
    side = made["latent_side"]
    return Generator(
        model,
        denoiser.eval().to(memory_format=torch.channels_last),  # a fifth faster on a CPU
        DDPMScheduler.from_pretrained(base / "scheduler"),
        vae,
        (config["in_channels"], side, side),
        text,
        made.get("guidance", 1.0),
        made.get("stretched", False),
        there,
    )


def take_weights(network, folder):
    """Copy a checkpoint's weights into `network` wherever name and shape agree; says how many did.

    What is frozen in `network`, as the text model under its ControlNet, stays as it is. Raises
    DiffEchoError where fewer than half do.
    """
    stored = {}
    for path in _weights(folder):
        stored |= load_file(path)
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    wanted = {name: t for name, t in network.state_dict().items() if name not in frozen}
    prefixes = (
        "",
        "unet.",
        "unets.0.",
        "controlnet.",
    )  # a denoiser wraps the network that was saved
    taken = {
        prefix + name: tensor.float()
        for prefix in prefixes
        for name, tensor in stored.items()
        if prefix + name in wanted and wanted[prefix + name].shape == tensor.shape
    }
    if len(taken) < len(wanted) / 2:
        raise DiffEchoError(
            f"{folder}: {len(taken)} of {len(wanted)} weights fit this network; start from a "
            "checkpoint of the same model and profile"
        )
    network.load_state_dict(taken, strict=False)
    return f"started from {folder}: {len(taken)} of {len(wanted)} weights fit"


def needed(folder, name):
    """The checkpoint `name` that `folder` was trained with; DiffEchoError if it is another now."""
    reference = read_training(folder).get("needs", {}).get(name)
    if not reference:
        raise DiffEchoError(f"{folder}: training.json names no {name}; train or copy it again")
    other = Path(os.path.normpath(Path(folder).resolve() / reference["path"]))
    if not (other / "training.json").is_file():
        raise DiffEchoError(f"{other}: missing, and {folder} needs this {name}; copy it there")
    if weights_digest(other) != reference["sha256"]:
        raise DiffEchoError(
            f"{other}: not the {name} that {folder} was trained with (its SHA-256 differs); "
            f"restore that one, or train {Path(folder).name} again"
        )
    return other


def read_training(folder):
    """The checkpoint's training.json: how, on what, for how long it was trained."""
    path = Path(folder) / "training.json"
    if not path.is_file():
        raise DiffEchoError(f"{path}: missing; is {folder} a checkpoint that `train` wrote?")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DiffEchoError(f"{path}: half-written ({error}); train or copy it again") from None


def training_curve(training, stage):
    """The whole log of a `stage` (training.json), with those of the trainings that it went on from.

    DataFrame with the log's columns, `images`, the number of images seen by then, and `hardware`.
    """
    logs, seen = [], 0
    runs = [training]
    while runs[0].get("started_from"):
        runs.insert(0, runs[0]["started_from"])
    for run in runs:
        recipe, log = run["recipes"][stage], pd.DataFrame(run["log"][stage])
        a_step = recipe["batch"] * recipe["accumulation"] * run.get("processes", 1)
        log["images"] = seen + log["step"] * a_step
        log["hardware"] = run.get("hardware")
        seen = log["images"].iloc[-1]
        logs.append(log)
    return pd.concat(logs, ignore_index=True)


def weights_digest(folder):
    """SHA-256 over the weights of a checkpoint, all its parts, in order of their names."""
    digest = hashlib.sha256()
    try:
        for path in _weights(folder):
            digest.update(path.read_bytes())
    except OSError as error:
        raise DiffEchoError(f"{folder}: unreadable ({error}); copy the checkpoint again") from None
    return digest.hexdigest()


def _load(network, folder):
    """The network in `folder`, float32; `network`: its class, None for one of MONAI's."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise DiffEchoError(
            f"{folder}: no config.json, so no checkpoint; pass a folder `train` wrote"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise DiffEchoError(f"{path}: half-written ({error}); train or copy it again") from None
    found = config.get("_class_name") or (config.get("architectures") or ["nothing known"])[0]
    wanted = MONAI_NETWORKS if network is None else (network.__name__,)
    if found not in wanted:
        raise DiffEchoError(f"{folder}: holds a {found}, expected a {' or '.join(wanted)}")
    weights = folder / (CLIP_WEIGHTS if found == "CLIPModel" else WEIGHTS)
    try:
        with safe_open(weights, "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise DiffEchoError(
            f"{weights}: half-written or missing ({error}); copy it again"
        ) from None
    if found == "CLIPModel":
        model = network.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return model.eval()
    model = (
        models.monai_network(found, **_without_name(config))
        if network is None
        else network.from_config(network.load_config(folder))
    )
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if stored != expected:
        odd = sorted(set(stored.items()) ^ set(expected.items()))[0][0]
        raise DiffEchoError(
            f"{folder}: weights and config.json describe different architectures (first at {odd!r}: "
            f"{stored.get(odd)} stored, {expected.get(odd)} expected); keep both files of one training"
        )
    model.load_state_dict(load_file(weights))
    return model.eval()


def _without_name(config):
    return {key: value for key, value in config.items() if key != "_class_name"}


def _save_part(part, folder):
    """Save one network (half precision, `part` itself unchanged), scheduler or tokenizer."""
    if not isinstance(part, nn.Module):
        part.save_pretrained(folder)
    elif part.config.__class__ is dict:  # MONAI's
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: _half(tensor) for name, tensor in part.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        (folder / "config.json").write_text(json.dumps(part.config, indent=1) + "\n")
    else:
        half = copy.deepcopy(part).cpu().half().to(memory_format=torch.contiguous_format)
        half.save_pretrained(folder)


def _half(tensor):
    tensor = tensor.detach().cpu().contiguous()
    return tensor.half() if tensor.is_floating_point() else tensor


def _replace_folder(folder, write, training):
    """Write a checkpoint's files beside `folder`, then move them in; other files there stay.

    training.json goes first and comes last: a folder without it was left in between, and the
    training's state beside it still holds the weights.
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    write(beside)
    facts = beside / "training.json"
    facts.write_text(json.dumps(training, indent=1) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / facts.name).unlink(missing_ok=True)
    for path in [*sorted(set(beside.iterdir()) - {facts}), facts]:
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    beside.rmdir()


def _weights(folder):
    """Files of a checkpoint's weights, in order of their names, without those of its training's state."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    return [path for path in files if "state" not in path.relative_to(folder).parts]
