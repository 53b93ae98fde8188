"""The networks: build them for a profile, save and load them as standard folders.

Chapters 02 to 06. Everything here is a stock class of diffusers, transformers or MONAI, so
`AutoencoderKL.from_pretrained(folder)` and its like load the same folders without this package.

The four denoisers below are all that differs between the four generators: each takes noisy
latents, timesteps and its own conditions, and training and sampling call them alike.
"""

import copy
import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from accelerate import PartialState
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from monai.networks import nets
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from tokenizers.trainers import BpeTrainer
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from diffecho_utils import DiffEchoError, camus, data

transformers.utils.logging.disable_progress_bar()  # a bar for each file is noise in a page

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLIP_WEIGHTS = "model.safetensors"
TOKENS = 48  # longest prompt, in tokens
GENERATORS = ("unconditional", "text", "text-seg", "sdm")
MONAI_NETWORKS = ("SPADEDiffusionModelUNet", "UNet", "ResNet")


def processes():
    """The processes of `accelerate launch`, on CUDA's devices or else the CPU; one without it.

    Apple's GPUs were never tried here. The processes wait two hours for each other: one may
    have a whole set to draw while the others are done.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))


def device():
    """Where this process's networks run: its GPU, else the CPU."""
    return processes().device


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


def build_unconditional(profile):
    """UNet2DModel that is told the timestep only: one for each of the four classes.

    On latents, with attention at every level but the first; on pixels where the profile says so
    (paper), with attention at the last but one.
    """
    channels, pixels = profile.unconditional_channels, profile.unconditional_pixels
    if pixels:
        kinds = ["DownBlock2D"] * len(channels)
        kinds[-2] = "AttnDownBlock2D"
        return UNet2DModel(
            sample_size=pixels,
            in_channels=1,
            out_channels=1,
            block_out_channels=channels,
            down_block_types=kinds,
            up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)],
            norm_num_groups=16,
        )
    attention = len(channels) - 1
    return UNet2DModel(
        sample_size=profile.side // autoencoder_factor(profile),
        in_channels=profile.latent_channels,
        out_channels=profile.latent_channels,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * attention,
        up_block_types=("AttnUpBlock2D",) * attention + ("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=16,
    )


def build_text_unet(profile):
    """UNet2DConditionModel: cross-attention to the tokens of a prompt at every level but the first.

    Profile paper: Stable Diffusion's own, from a local folder or the Hub.
    """
    if profile.pretrained:
        return UNet2DConditionModel.from_pretrained(profile.pretrained, subfolder="unet")
    channels = profile.unet_channels
    crossed = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=profile.side // autoencoder_factor(profile),
        in_channels=profile.latent_channels,
        out_channels=profile.latent_channels,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * crossed,
        up_block_types=("CrossAttnUpBlock2D",) * crossed + ("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=profile.clip_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_controlnet(unet):
    """ControlNetModel: a trainable copy of the text model's encoder, joined by zero convolutions.

    The control image has three channels, red the LV cavity, green the myocardium, blue the atrium,
    so that stock pipelines take a label map as an RGB picture. Its hint network is half as wide as is
    usual: it works at the resolution of images, and would take half of the training's time.
    """
    return ControlNetModel.from_unet(
        unet, conditioning_channels=3, conditioning_embedding_out_channels=(8, 16, 32, 64)
    )


def build_sdm(profile):
    """MONAI's SPADEDiffusionModelUNet: the label map modulates every normalisation of the decoder."""
    channels = profile.sdm_channels
    return _monai(
        "SPADEDiffusionModelUNet",
        spatial_dims=2,
        in_channels=profile.latent_channels,
        out_channels=profile.latent_channels,
        label_nc=len(camus.LABELS),
        num_res_blocks=1,
        channels=channels,
        attention_levels=(False,) + (True,) * (len(channels) - 1),
        norm_num_groups=16,
        num_head_channels=16,
        spade_intermediate_channels=32,
    )


def build_tokenizer(texts):
    """CLIPTokenizer whose byte-pair merges were learned on `texts`: any word can be spelled with it."""
    bpe = Tokenizer(token_models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bounds = ["<|startoftext|>", "<|endoftext|>"]
    trainer = BpeTrainer(
        vocab_size=1000,
        special_tokens=bounds,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([text.lower() for text in texts], trainer)
    model = json.loads(bpe.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):  # letters that end a word
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def build_clip(profile, tokenizer):
    """CLIPModel (Radford et al. 2021) with small towers: a text transformer and a vision transformer."""
    width, layers = profile.clip_width, profile.clip_layers
    tower = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
    tower |= {"intermediate_size": 4 * width}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends |= {"pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": TOKENS}
    text = CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=width, **tower, **ends)
    vision = CLIPVisionConfig(
        image_size=profile.side,
        patch_size=profile.side // 8,
        num_channels=1,
        attention_dropout=0.1,
        projection_dim=width,
        **tower,
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=width)
    )


def build_segmenter(profile):
    """MONAI UNet: (N, 1, H, W) in [-1, 1] -> (N, 4, H, W) logits of CAMUS's labels."""
    channels = profile.segmenter_channels
    return _monai(
        "UNet",
        spatial_dims=2,
        in_channels=1,
        out_channels=len(camus.LABELS),
        channels=channels,
        strides=(2,) * (len(channels) - 1),
        num_res_units=2,
    )


def build_paper_segmenter(side):
    """The paper's MONAI UNet for images of `side` pixels: 2, 4, ... channels down to 2 x 2 positions.

    At the paper's 256 pixels (2, 4, ..., 256) with 7 strides; at 128 one level less, since instance
    normalisation has nothing to normalise in a single position.
    """
    levels = int(math.log2(side))
    return _monai(
        "UNet",
        spatial_dims=2,
        in_channels=1,
        out_channels=len(camus.LABELS),
        channels=[2 ** (level + 1) for level in range(levels)],
        strides=(2,) * (levels - 1),
        num_res_units=0,
        act=("LEAKYRELU", {"negative_slope": 0.1}),
    )


def build_classifier(profile):
    """MONAI ResNet with one block a stage: (N, 1, H, W) in [-1, 1] -> (N, 4) logits of `camus.CLASSES`."""
    return _monai(
        "ResNet",
        block="basic",
        layers=[1, 1, 1, 1],
        block_inplanes=list(profile.classifier_channels),
        spatial_dims=2,
        n_input_channels=1,
        num_classes=len(camus.CLASSES),
    )


BACKBONES = ("resnet18", "resnet50", "vgg16", "vgg19", "efficientnet-b0")  # the paper's classifiers
_VGG = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}  # convolutions of each block


class Backbone(nn.Module):
    """One of `BACKBONES` for grey images: (N, 1, H, W) in [-1, 1] -> (N, classes) logits.

    The grey channel is given three times, scaled as ImageNet's were. Built of MONAI's networks, and
    of torch's layers for VGG, which MONAI does not have; `pretrained`: torchvision's network with
    its ImageNet weights, for machines that have torchvision. Raises DiffEchoError for a name that
    is none of them, and where torchvision is asked for and missing.
    """

    def __init__(self, name, classes=4, pretrained=False):
        super().__init__()
        if name not in BACKBONES:
            raise DiffEchoError(f"no classifier {name!r}; choose one of {', '.join(BACKBONES)}")
        self.network = _torchvision(name, classes) if pretrained else _untrained(name, classes)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, images):
        return self.network(((images + 1) / 2 - self.mean) / self.scale)

    def freeze_all_but(self, parameters):
        """Leave the last layers trainable, so many that they have at least `parameters` weights."""
        left = parameters
        for weights in reversed(list(self.network.parameters())):
            weights.requires_grad_(left > 0)
            left -= weights.numel()


def _untrained(name, classes):
    if name.startswith("resnet"):
        settings = {"shortcut_type": "B", "bias_downsample": False, "conv1_t_stride": 2}
        build = getattr(nets, name)
        return build(spatial_dims=2, n_input_channels=3, num_classes=classes, **settings)
    if name == "efficientnet-b0":
        network = nets.EfficientNetBN(
            name, pretrained=False, spatial_dims=2, in_channels=3, num_classes=classes
        )
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.1  # 0.01 would need thousands of steps
        return network
    layers, channels = [], 3
    for convolutions, width in zip(_VGG[name], (64, 128, 256, 512, 512), strict=True):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            # Without normalisation the signal dies on its way through torch's own start (He et al. 2015)
            nn.init.kaiming_normal_(layers[-2].weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layers[-2].bias)
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    head = []
    for inputs in (512 * 7 * 7, 4096):
        head += [nn.Linear(inputs, 4096), nn.ReLU(inplace=True), nn.Dropout()]
    network = nn.Sequential()  # torchvision's names, so that its weights fit
    network.add_module("features", nn.Sequential(*layers))
    network.add_module("avgpool", nn.AdaptiveAvgPool2d(7))
    network.add_module("flatten", nn.Flatten())
    network.add_module("classifier", nn.Sequential(*head, nn.Linear(4096, classes)))
    return network


def _torchvision(name, classes):
    try:
        from torchvision import models as theirs
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise DiffEchoError(
            f"ImageNet weights need torchvision, which cannot be imported ({error}); install it, or "
            "train from scratch"
        ) from None
    network = theirs.get_model(name.replace("-", "_"), weights="DEFAULT")
    last = network.fc if hasattr(network, "fc") else network.classifier[-1]
    head = nn.Linear(last.in_features, classes)
    if hasattr(network, "fc"):
        network.fc = head
    else:
        network.classifier[-1] = head
    return network


def build_scheduler(prediction="v_prediction"):
    """Stable Diffusion's noise schedule, sampled from its last timestep on ("trailing").

    prediction: of the velocity (Salimans and Ho 2022) or of the noise, "epsilon". Stable Diffusion's
    own spacing, "leading", starts few steps well below pure noise (Lin et al. 2024; chapter 07).
    """
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="trailing",
    )


def autoencoder_factor(profile):
    """Pixels of the image side for one of the latent side."""
    return 2 ** (len(profile.autoencoder_channels) - 1)


def count_parameters(module):
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


class Unconditional(nn.Module):
    """Four networks, one a class: `classes` (N,) says which; None: the only one there is.

    unets: in the order of `camus.CLASSES`, None for a class that was not trained.
    """

    def __init__(self, unets):
        super().__init__()
        self.unets = nn.ModuleList(unets)

    def forward(self, noisy, timesteps, classes=None):
        if classes is None:
            return self.unets[0](noisy, timesteps).sample
        predicted = torch.empty_like(noisy)
        for index in classes.unique():
            rows = classes == index
            unet = self.unets[int(index)]
            predicted[rows] = unet(noisy[rows], timesteps[rows]).sample.to(noisy.dtype)
        return predicted


class TextGuided(nn.Module):
    """The text model: `text` is (N, L, D), the last hidden states of the prompts' tokens."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, noisy, timesteps, text):
        return self.unet(noisy, timesteps, text).sample


class TextSegmentationGuided(nn.Module):
    """ControlNet on the frozen text model: `masks` (N, H, W) label maps steer it, beside `text`.

    `strength` multiplies what the ControlNet adds; 1 is as trained. Stock pipelines call it
    controlnet_conditioning_scale.
    """

    def __init__(self, unet, controlnet, strength=1.0):
        super().__init__()
        self.unet, self.controlnet = unet.requires_grad_(False), controlnet
        self.strength = strength

    def forward(self, noisy, timesteps, text, masks):
        down, middle = self.controlnet(
            noisy,
            timesteps,
            text,
            controlnet_cond=control_image(masks),
            conditioning_scale=self.strength,
            return_dict=False,
        )
        return self.unet(
            noisy,
            timesteps,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample


class SemanticDiffusion(nn.Module):
    """SDM in the latent space: SPADE layers see which share of each latent pixel has which label.

    `masks` (N, H, W) label maps; where `unlabelled` (N,) is true the map counts as unknown: all
    shares zero, the null condition of its guidance.
    """

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, noisy, timesteps, masks, unlabelled=None):
        shares = F.adaptive_avg_pool2d(_one_hot(masks), noisy.shape[-2:])
        if unlabelled is not None:
            shares = shares * ~unlabelled.view(-1, 1, 1, 1)
        return self.unet(noisy, timesteps, seg=shares)


def control_image(masks):
    """Label maps (N, H, W) as the ControlNet's RGB picture: (N, 3, H, W) float32, 0 or 1.

    Raises DiffEchoError for labels that CAMUS does not have.
    """
    return _one_hot(masks)[:, 1:]


def _one_hot(masks):
    if masks.max() >= len(camus.LABELS) or masks.min() < 0:
        raise DiffEchoError(
            f"label map with labels {masks.unique().tolist()}, known are {camus.LABELS}; map them to these"
        )
    return F.one_hot(masks.long(), len(camus.LABELS)).movedim(-1, 1).float()


def tokens(tokenizer, texts):
    """(N, L) int64 ids of N texts in lower case, each padded or cut to `TOKENS`."""
    return tokenizer(
        [text.lower() for text in texts],
        padding="max_length",
        max_length=TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids


class TextEncoder:
    """Prompts to token states: the text half of a CLIP checkpoint, on the device it is called for."""

    def __init__(self, clip_folder):
        clip, self.tokenizer = load_clip(clip_folder)
        self.model = clip.text_model

    @torch.no_grad()
    def __call__(self, texts):
        """(N, L, D) float32 last hidden states of N texts, each padded to `TOKENS`; "" is the null prompt."""
        ids = tokens(self.tokenizer, texts)
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


def load_network(folder):
    """The segmenter or classifier in `folder`, a `Judge`; errors as `load_autoencoder`."""
    made = read_training(folder)
    if "side" not in made:
        raise DiffEchoError(f"{folder}: training.json names no side of its frames; train it again")
    return Judge(_load(None, folder), made["side"], made.get("stretched", False)).eval()


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


def load_generator(folder):
    """The `Generator` in `folder`, of whichever model, with the checkpoints it was trained with.

    Raises DiffEchoError where one of those is missing or is not the one of the training.
    """
    folder = Path(folder)
    made = read_training(folder)
    model = made.get("model")
    if model not in GENERATORS:
        raise DiffEchoError(f"{folder}: a checkpoint of {model!r}, no generator ({GENERATORS})")
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
        denoiser, config = Unconditional(unets), unets[there[0]].config
    elif model == "sdm":
        denoiser = SemanticDiffusion(_load(None, folder / "unet"))
        config = denoiser.unet.config
    else:
        text = TextEncoder(needed(base, "clip"))
        unet = _load(UNet2DConditionModel, base / "unet")
        config = unet.config
        denoiser = TextGuided(unet)
        if model == "text-seg":
            controlnet = _load(ControlNetModel, folder / "controlnet")
            denoiser = TextSegmentationGuided(unet, controlnet, made.get("strength", 1.0))
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


def _monai(name, **settings):
    """MONAI's network `name`, with its settings as `config`, as diffusers' networks have them."""
    network = getattr(nets, name)(**settings)
    network.config = {"_class_name": name} | settings
    return network


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
        _monai(found, **_without_name(config))
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


def weights_digest(folder):
    """SHA-256 over the weights of a checkpoint, all its parts, in order of their names."""
    digest = hashlib.sha256()
    try:
        for path in _weights(folder):
            digest.update(path.read_bytes())
    except OSError as error:
        raise DiffEchoError(f"{folder}: unreadable ({error}); copy the checkpoint again") from None
    return digest.hexdigest()


def _weights(folder):
    """Files of a checkpoint's weights, in order of their names, without those of its training's state."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    return [path for path in files if "state" not in path.relative_to(folder).parts]
