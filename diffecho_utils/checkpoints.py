"""Checkpoints on disk: standard folders that stock diffusers and transformers load without this package.

Chapters 02 to 10. Beside the weights lies training.json: how the network was trained, the geometry of its
frames, and which checkpoints it builds on.
"""

import copy
import json
import os
import shutil
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffecho_utils import DiffEchoError, base, camus, data, files, models

STUDENTS = {"sdm-student": "sdm"}  # what they are told and how they are drawn with
WEIGHTS = "diffusion_pytorch_model.safetensors"


class TextEncoder:
    """Prompts to token states: the text half of a CLIP and its tokenizer, where the network is."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def __call__(self, texts):
        """(N, L, D) float32 last hidden states of N texts, each padded to what it takes; "" is the null prompt."""
        ids = models.tokens(self.tokenizer, texts)
        device = next(self.model.parameters()).device
        return self.model(ids.to(device)).last_hidden_state


@dataclass(frozen=True)
class Generator:
    """What sampling needs: a denoiser, its noise schedule, the autoencoder, and the words' encoder."""

    model: str  # one of `models.GENERATORS`
    denoiser: nn.Module
    scheduler: diffusers.DDPMScheduler
    vae: diffusers.AutoencoderKL | None  # None: it diffuses pixels
    latent_shape: tuple[int, int, int]  # (C, h, w) of one latent
    text: TextEncoder | None = None  # None: it reads no prompts
    guidance: float = 1.0  # the scale that its training.json recommends
    stretched: bool = False  # whether its frames were stretched to the square, or padded
    classes: tuple[int, ...] = tuple(range(len(camus.CLASSES)))  # indices of what it can draw
    # Its null condition: without "words", as in stock pipelines; without words and map, "all"; or without
    # the map and with the words of the "opposite" view and moment
    null: str = "words"

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
    """A segmenter or classifier with the geometry of the frames that it learned to read (`data.Geometry`).

    Images (N, 1, H, W) of another size are resized to `side` pixels, and a segmenter's logits back.
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

    Networks are kept in half precision; "" is the folder itself; `training` becomes training.json, with
    the relative path of each checkpoint it was trained with, needs {name: folder}, and the SHA-256 of its weights.
    Written beside, then moved in; other files there stay. training.json goes first and comes last: a
    folder without it was left in between, and the training's state in it still holds the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        for subfolder, part in parts:
            _save_part(part, Path(beside) / subfolder)
        references = {}
        for name, other in (needs or {}).items():
            path = os.path.relpath(Path(other).resolve(), folder.resolve())
            references[name] = {"path": path, "sha256": weights_digest(other)}
        last = Path(beside) / "training.json"
        last.write_text(json.dumps(training | {"needs": references}, indent=1) + "\n")
        (folder / last.name).unlink(missing_ok=True)
        for path in [*sorted(set(last.parent.iterdir()) - {last}), last]:
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)


def _save_part(part, folder):
    """Save one network (half precision, `part` itself unchanged), scheduler or tokenizer."""
    if isinstance(part, nn.Module):
        part = copy.deepcopy(part).cpu().half().to(memory_format=torch.contiguous_format)
    if hasattr(part, "save_pretrained"):
        part.save_pretrained(folder)
    else:  # MONAI's
        folder.mkdir(parents=True, exist_ok=True)
        save_file(part.state_dict(), folder / WEIGHTS)
        (folder / "config.json").write_text(json.dumps(part.config, indent=1) + "\n")


def load_autoencoder(folder):
    """The AutoencoderKL in `folder`, float32, in evaluation mode.

    Raises DiffEchoError for a missing, half-written or other network's folder.
    """
    return _load(folder, "AutoencoderKL")


def load_clip(folder):
    """(CLIPModel, CLIPTokenizer) in `folder`; errors as `load_autoencoder`."""
    with torch.random.fork_rng([]):  # as transformers' own loading: no random numbers are used up
        clip = _load(folder, "CLIPModel")
    return clip, CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def load_text_encoder(folder):
    """The `TextEncoder` of the CLIP checkpoint in `folder`; errors as `load_autoencoder`."""
    clip, tokenizer = load_clip(folder)
    return TextEncoder(clip.text_model, tokenizer)


def load_network(folder):
    """The segmenter or classifier in `folder`, a `Judge`; errors as `load_autoencoder`."""
    made = read_training(folder)
    if "side" not in made:
        raise DiffEchoError(f"{folder}: training.json names no side of its frames; train it again")
    network = _load(folder, "UNet", "ResNet")
    return Judge(network, made["side"], made.get("stretched", False)).eval()


def load_generator(folder, name=None, decoder=None):
    """The `Generator` in `folder`, of whichever model, with the checkpoints it was trained with.

    name: of the base that it was trained on (`base`), where that lies elsewhere by now. decoder: folder of a
    small decoder, to decode with that instead. Raises DiffEchoError where one of those is missing or is not
    the one of the training, and for a decoder of another autoencoder.
    """
    folder, made = Path(folder), read_training(folder)
    model = STUDENTS.get(made.get("model"), made.get("model"))
    if model not in models.GENERATORS:
        raise DiffEchoError(
            f"{folder}: a checkpoint of {model!r}, no generator ({models.GENERATORS})"
        )
    text, coder, classes = None, None, Generator.classes
    if made.get("base"):
        unet, vae, text, scheduler = _on_base(folder, made, name)
    else:
        under = needed(folder, "text") if model == "text-seg" else folder
        coder = needed(under, "autoencoder") if made["needs"] else None
        vae = coder and load_autoencoder(coder)
        scheduler = diffusers.DDPMScheduler.from_pretrained(under / "scheduler")
        if model in ("text", "text-seg"):
            text = load_text_encoder(needed(under, "clip"))
            unet = _load(under / "unet", "UNet2DConditionModel")
    if model == "unconditional":
        trained = made.get("recipes", camus.CLASS_NAMES)
        classes = tuple(i for i in classes if camus.CLASS_NAMES[i] in trained)
        unets = [
            _load(folder / kind, "UNet2DModel") if kind in trained else None
            for kind in camus.CLASS_NAMES
        ]
        shared = _load(folder / "shared", "UNet2DModel") if "shared" in trained else None
        denoiser = models.Unconditional(unets, shared)
    elif model == "sdm":
        denoiser = models.SemanticDiffusion(_load(folder / "unet", "SPADEDiffusionModelUNet"))
    elif model == "text":
        denoiser = models.TextGuided(unet)
    else:
        controlnet = _load(folder / "controlnet", "ControlNetModel")
        denoiser = models.TextSegmentationGuided(unet, controlnet, made.get("strength", 1.0))
    if decoder:
        vae = _small_decoder(decoder, coder, folder)
    channels, side = 1 if vae is None else vae.config.latent_channels, made["latent_side"]
    return Generator(
        model,
        denoiser.eval().to(memory_format=torch.channels_last),  # a fifth faster on a CPU
        scheduler,
        vae,
        (channels, side, side),
        text,
        made.get("guidance", 1.0),
        made.get("stretched", False),
        classes,
        made.get("null", Generator.null),
    )


def _small_decoder(folder, coder, generator):
    """The AutoencoderTiny in `folder`; DiffEchoError where it decodes other latents than those of `coder`."""
    distilled = read_training(folder)["needs"].get("autoencoder", {}).get("sha256")
    if coder is None or distilled != weights_digest(coder):
        raise DiffEchoError(
            f"{folder}: decodes the latents of another autoencoder than that of {generator}; leave "
            "--decoder out, or train a small-decoder for this one"
        )
    return _load(folder, "AutoencoderTiny")


def _on_base(folder, made, name):
    """(unet, vae, text, scheduler) of what was fine-tuned on a base: all but a trained UNet comes from there."""
    at, lora = base.folder_of(name or made["base"]["name"]), folder / base.LORA_WEIGHTS
    if base.digest(at) != made["base"]["sha256"]:
        raise DiffEchoError(
            f"{at}: not the base that {folder} was trained on, {made['base']['name']} (its SHA-256 "
            "differs); name that one with --base"
        )
    if made["model"] == "text" and not lora.is_file():
        unet = _load(folder / "unet", "UNet2DConditionModel")
    else:
        unet = base.load(at, "unet")
    if lora.is_file():
        unet.load_lora_adapter(folder, weight_name=lora.name, prefix="unet")
    text = TextEncoder(base.load(at, "text_encoder"), base.load_tokenizer(at))
    return unet, base.load(at, "vae"), text, base.load_scheduler(at)


def _load(folder, *classes):
    """The network in `folder`, float32, in evaluation mode; it must be of one of the stock `classes`."""
    folder = Path(folder)
    path = folder / "config.json"
    config = files.read_json(path, "train or copy it again, or pass a folder that `train` wrote")
    found = config.get("_class_name") or (config.get("architectures") or ["nothing known"])[0]
    if found not in classes:
        raise DiffEchoError(f"{folder}: holds a {found}, expected a {' or '.join(classes)}")
    weights = folder / ("model.safetensors" if found == "CLIPModel" else WEIGHTS)
    try:
        if found == "CLIPModel":
            network = CLIPModel(CLIPConfig.from_dict(config))
        elif hasattr(diffusers, found):
            if found == "AutoencoderTiny":  # it writes what it warns of when it reads it
                config.pop("block_out_channels", None)
            network = getattr(diffusers, found).from_config(config)
        else:
            network = models.monai_network(config.pop("_class_name"), **config)
        network.load_state_dict(load_file(weights))
    except (OSError, SafetensorError) as error:
        raise DiffEchoError(
            f"{weights}: half-written or missing ({error}); copy it again"
        ) from None
    except (RuntimeError, TypeError, ValueError) as error:
        raise DiffEchoError(
            f"{folder}: weights and config.json describe different architectures "
            f"({textwrap.shorten(str(error), 200)}); keep both files of one training"
        ) from None
    return network.eval()


def take_weights(network, folder):
    """Copy a checkpoint's weights into `network` wherever name and shape agree; says how many did.

    `folder` is that of the network itself (`save`). Raises DiffEchoError where fewer than half do.
    """
    wanted, stored = network.state_dict(), {}
    for path in Path(folder).glob("*.safetensors"):
        stored |= load_file(path)
    fit = {k: v for k, v in stored.items() if k in wanted and v.shape == wanted[k].shape}
    if len(fit) < len(wanted) / 2:
        raise DiffEchoError(
            f"{folder}: {len(fit)} of {len(wanted)} weights fit this network; start from a "
            "checkpoint of the same model and profile"
        )
    network.load_state_dict(fit, strict=False)
    return f"started from {folder}: {len(fit)} of {len(wanted)} weights fit"


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


def weights_digest(folder):
    """SHA-256 over the weights of a checkpoint, in order of their names, without its training's state."""
    paths = sorted(Path(folder).rglob("*.safetensors"))
    try:
        return files.digest(p for p in paths if "state" not in p.relative_to(folder).parts)
    except OSError as error:
        raise DiffEchoError(f"{folder}: unreadable ({error}); copy the checkpoint again") from None


def read_training(folder):
    """The checkpoint's training.json: how, on what, for how long it was trained."""
    remedy = f"is {folder} a checkpoint that `train` wrote? Else train or copy it again"
    return files.read_json(Path(folder) / "training.json", remedy)


def training_curve(training, stage):
    """The whole log of a `stage` (training.json), with those of the trainings that it went on from.

    DataFrame with the log's columns, `images`, the number of images seen by then, and `hardware`.
    """
    logs, seen, runs = [], 0, [training]
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


def budget(folder):
    """What a checkpoint's training took, from the logs that it carries, those it went on from included.

    {"images": seen, "before": those that the generator saw that it is built on, "hours": both
    together, "hardware"}. A ControlNet's own images had label maps; its text model's, before, had none.
    """
    training, earlier = (
        read_training(folder),
        {"images": 0, "before": 0, "hours": 0, "hardware": []},
    )
    curves = [training_curve(training, stage) for stage in training["recipes"]]
    if "text" in training["needs"]:
        earlier = budget(needed(folder, "text"))
    machines = [*earlier["hardware"], *(name for curve in curves for name in curve["hardware"])]
    return {
        "images": int(sum(curve["images"].iloc[-1] for curve in curves)),
        "before": earlier["images"] + earlier["before"],
        "hours": earlier["hours"] + float(sum(c["seconds"].sum() for c in curves)) / 3600,
        "hardware": list(dict.fromkeys(machines)),
    }
