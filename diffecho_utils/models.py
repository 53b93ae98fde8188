"""The networks, built for a profile from stock classes of diffusers, transformers and MONAI.

Chapters 02 to 06. The four denoisers below are all that differs between the four generators: each
takes noisy latents, timesteps and its own conditions, and training and sampling call them alike.
"""

import itertools
import math
import re
from collections import Counter
from datetime import timedelta
from importlib.util import find_spec

import diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import PartialState
from monai.networks import nets
from tokenizers import pre_tokenizers
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from diffecho_utils import DiffEchoError, camus

transformers.utils.logging.disable_progress_bar()  # a bar for each file is noise in a page

TOKENS = 48  # longest prompt, in tokens
GENERATORS = ("unconditional", "text", "text-seg", "sdm")


def processes():
    """The processes of `accelerate launch`, on CUDA's devices or else the CPU; one without it.

    Apple's GPUs were never tried here. The processes wait two hours for each other: one may
    have a whole set to draw while the others are done.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))


def device():
    """Where this process's networks run: its GPU, else the CPU."""
    return processes().device


def half(recipe):
    """The half precision that a `profiles.Recipe` is trained in here: a dtype, or None.

    bfloat16 where a GPU has it for real (a T4 has not); else float16 for a recipe that spares memory.
    """
    if not recipe.bf16 or not torch.cuda.is_available():
        return None
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if recipe.sparing else None


def adam(recipe):
    """The optimiser's class for a `profiles.Recipe`: AdamW, or bitsandbytes' with a quarter of its state."""
    if recipe.sparing and torch.cuda.is_available() and find_spec("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit
    return torch.optim.AdamW


def build_autoencoder(profile):
    """AutoencoderKL, grey-scale in and out, one halving less than it has levels (factor 8 with four).

    No attention in the middle: the network stays fully convolutional, so that what is trained on
    crops works on whole frames.
    """
    channels = profile.autoencoder_channels
    return diffusers.AutoencoderKL(
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


def build_small_decoder(profile):
    """AutoencoderTiny whose decoder takes the latents of `build_autoencoder`; its encoder is never trained."""
    levels = len(profile.autoencoder_channels)
    channels = (profile.small_decoder_channels,) * levels
    return diffusers.AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1,) + (0,) * (levels - 1),
        num_decoder_blocks=(3, 3, 1, 0)[-levels:],
        latent_channels=profile.latent_channels,
    )


def autoencoder_factor(profile):
    """Pixels of the image side for one of the latent side."""
    return 2 ** (len(profile.autoencoder_channels) - 1)


def latent_shape(vae, side):
    """(C, h, w) of the latent of an image of `side` pixels."""
    side //= 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, side, side


def build_discriminator(channels=(32, 64, 96), inputs=2):
    """Patch discriminator with spectral normalisation: (N, inputs, H, W) -> (N, 1, H/8, W/8) logits.

    A halving for each of `channels`.
    """
    layers = []
    for before, after in itertools.pairwise((inputs, *channels)):
        layers += [spectral_norm(nn.Conv2d(before, after, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels[-1], 1, 3, 1, 1)))


def build_unconditional(profile):
    """UNet2DModel that is told the timestep only: one for each of the four classes.

    On latents, with attention at every level but the first; on pixels where the profile says so
    (paper), with attention at the last but one.
    """
    channels, settings = profile.unconditional_channels, {}
    if profile.unconditional_pixels:
        side, inputs = profile.unconditional_pixels, 1
        down = ["DownBlock2D"] * len(channels)
        down[-2] = "AttnDownBlock2D"
    else:
        side, inputs = profile.side // autoencoder_factor(profile), profile.latent_channels
        down = ["DownBlock2D", *["AttnDownBlock2D"] * (len(channels) - 1)]
        settings = {"layers_per_block": 1, "attention_head_dim": 16}
    return _unet(diffusers.UNet2DModel, side, inputs, channels, down, **settings)


def build_text_unet(profile):
    """UNet2DConditionModel: cross-attention to the tokens of a prompt at every level but the first."""
    return _unet(
        diffusers.UNet2DConditionModel,
        profile.side // autoencoder_factor(profile),
        profile.latent_channels,
        profile.unet_channels,
        ["DownBlock2D", *["CrossAttnDownBlock2D"] * (len(profile.unet_channels) - 1)],
        layers_per_block=1,
        cross_attention_dim=profile.clip_width,
        attention_head_dim=4,
    )


def _unet(network, side, inputs, channels, down, **settings):
    """A UNet of diffusers whose way up mirrors its way down."""
    return network(
        sample_size=side,
        in_channels=inputs,
        out_channels=inputs,
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=[block.replace("Down", "Up") for block in reversed(down)],
        norm_num_groups=16,
        **settings,
    )


def build_controlnet(unet, hint=(8, 16, 32, 64)):
    """ControlNetModel: a trainable copy of the text model's encoder, joined by zero convolutions.

    The control image has three channels, red the LV cavity, green the myocardium, blue the atrium,
    so that stock pipelines take a label map as an RGB picture. hint: channels of the network that reads
    it, by default half as many as is usual: at the resolution of images it would take half of the time.
    """
    return diffusers.ControlNetModel.from_unet(
        unet, conditioning_channels=3, conditioning_embedding_out_channels=hint
    )


def build_sdm(profile):
    """MONAI's SPADEDiffusionModelUNet: the label map modulates every normalisation of the decoder."""
    channels = profile.sdm_channels
    return monai_network(
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


def build_scheduler(prediction="v_prediction"):
    """Stable Diffusion's noise schedule, sampled from its last timestep on ("trailing").

    prediction: of the velocity (Salimans and Ho 2022) or of the noise, "epsilon". Stable Diffusion's
    own spacing, "leading", starts few steps well below pure noise (Lin et al. 2024; chapter 07).
    """
    return diffusers.DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="trailing",
    )


def build_tokenizer(texts, size=1000, length=TOKENS):
    """CLIPTokenizer whose byte-pair merges were learned on `texts`: any word can be spelled with it.

    Byte-pair encoding (Sennrich et al. 2016): the most frequent pair of neighbours becomes a token, up to
    `size` tokens. Of equally frequent pairs the first in the alphabet is taken, so that the same texts always give
    the same tokenizer, which the trainer of Hugging Face's tokenizers does not.
    """
    pieces = [re.findall(r"[^\W\d_]+|\d|[^\s\w]+", text.lower()) for text in texts]  # as CLIP's
    words = Counter(itertools.chain.from_iterable(pieces))
    spelled = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    merges = []
    while len(known) < size:
        pairs = Counter()
        for word, symbols in spelled.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        if "".join(best) not in known:
            known.append("".join(best))
        for symbols in spelled.values():
            _merge(symbols, best)
    vocabulary = {token: index for index, token in enumerate(known)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def _merge(symbols, pair):
    """Make one symbol of each neighbouring `pair` in the list `symbols`."""
    place = 0
    while place < len(symbols) - 1:
        if (symbols[place], symbols[place + 1]) == pair:
            symbols[place : place + 2] = ["".join(pair)]
        place += 1


def tokens(tokenizer, texts):
    """(N, L) int64 ids of N texts in lower case, each padded or cut to what the tokenizer takes."""
    settings = {"padding": "max_length", "truncation": True}
    lower = [text.lower() for text in texts]
    return tokenizer(lower, return_tensors="pt", **settings).input_ids


def build_clip(profile, tokenizer):
    """CLIPModel (Radford et al. 2021) with small towers: a text transformer and a vision transformer."""
    width = profile.clip_width
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": profile.clip_layers,
        "num_attention_heads": width // 32,
        "projection_dim": width,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    side = profile.side
    vision = {"image_size": side, "patch_size": side // 8, "num_channels": 1}
    vision["attention_dropout"] = 0.1
    config = {"text_config": tower | text, "vision_config": tower | vision, "projection_dim": width}
    return transformers.CLIPModel(transformers.CLIPConfig(**config))


def build_segmenter(profile):
    """MONAI UNet: (N, 1, H, W) in [-1, 1] -> (N, 4, H, W) logits of CAMUS's labels."""
    return _segmenter(profile.segmenter_channels, num_res_units=2)


def build_paper_segmenter(side):
    """The paper's MONAI UNet for images of `side` pixels: 2, 4, ... channels down to 2 x 2 positions.

    At the paper's 256 pixels (2, 4, ..., 256) with 7 strides; at 128 one level less, since instance
    normalisation has nothing to normalise in a single position.
    """
    channels = [2**level for level in range(1, int(math.log2(side)) + 1)]
    return _segmenter(channels, num_res_units=0, act=("LEAKYRELU", {"negative_slope": 0.1}))


def _segmenter(channels, **settings):
    strides, labels = (2,) * (len(channels) - 1), len(camus.LABELS)
    shape = {"spatial_dims": 2, "in_channels": 1, "out_channels": labels}
    return monai_network("UNet", **shape, channels=channels, strides=strides, **settings)


def build_classifier(profile):
    """MONAI ResNet with one block a stage: (N, 1, H, W) in [-1, 1] -> (N, 4) logits of `camus.CLASSES`."""
    return monai_network(
        "ResNet",
        block="basic",
        layers=[1, 1, 1, 1],
        block_inplanes=list(profile.classifier_channels),
        spatial_dims=2,
        n_input_channels=1,
        num_classes=len(camus.CLASSES),
    )


def monai_network(name, **settings):
    """MONAI's network `name`, with its settings as `config`, as diffusers' networks have them."""
    network = getattr(nets, name)(**settings)
    network.config = {"_class_name": name} | settings
    return network


def count_parameters(module):
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


class Unconditional(nn.Module):
    """Four networks, one a class: `classes` (N,) says which; None: the only one there is.

    unets: in the order of `camus.CLASSES`, None for a class that was not trained. shared: the network of
    all classes that the four began from; it answers where the class is -1, unknown: the null condition.
    """

    def __init__(self, unets, shared=None):
        super().__init__()
        self.unets, self.shared = nn.ModuleList(unets), shared

    def forward(self, noisy, timesteps, classes=None):
        if classes is None:
            return self.unets[0](noisy, timesteps).sample
        predicted = torch.empty_like(noisy)
        for index in classes.unique():
            rows = classes == index
            unet = self.shared if index < 0 else self.unets[int(index)]
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
    controlnet_conditioning_scale. Where `unlabelled` (N,) is true nothing is added: the text model alone.
    """

    def __init__(self, unet, controlnet, strength=1.0):
        super().__init__()
        self.unet, self.controlnet = unet.requires_grad_(False), controlnet
        self.strength = strength

    def forward(self, noisy, timesteps, text, masks, unlabelled=None):
        hint, scale = control_image(masks), self.strength
        if unlabelled is not None and unlabelled.all():
            return self.unet(noisy, timesteps, text).sample
        added = self.controlnet(
            noisy, timesteps, text, controlnet_cond=hint, conditioning_scale=scale
        )
        down, middle = added.down_block_res_samples, added.mid_block_res_sample
        if unlabelled is not None:
            labelled = ~unlabelled.view(-1, 1, 1, 1)
            down, middle = [x * labelled for x in down], middle * labelled
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
        shares = label_shares(masks, noisy.shape[-2:])
        if unlabelled is not None:
            shares = shares * ~unlabelled.view(-1, 1, 1, 1)
        return self.unet(noisy, timesteps, seg=shares)


def control_image(masks):
    """Label maps (N, H, W) as the ControlNet's RGB picture: (N, 3, H, W) float32, 0 or 1.

    Raises DiffEchoError for labels that CAMUS does not have.
    """
    return _one_hot(masks)[:, 1:]


def label_shares(masks, size):
    """Which share of each latent pixel has which label: (N, H, W) -> (N, 4, *size)."""
    return F.adaptive_avg_pool2d(_one_hot(masks), size)


def _one_hot(masks):
    if masks.max() >= len(camus.LABELS) or masks.min() < 0:
        found = masks.unique().tolist()
        raise DiffEchoError(
            f"label map with labels {found}, known are {camus.LABELS}; map them to these"
        )
    return F.one_hot(masks.long(), len(camus.LABELS)).movedim(-1, 1).float()
