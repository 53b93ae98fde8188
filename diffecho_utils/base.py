"""A base: the parts of a Stable Diffusion 1.x pipeline, which the paper fine-tunes.

"At the paper's scale". A folder in the pipeline's layout, or its name on the Hub:

    BASE/model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/

Nothing of ours stands in for any of them. Grey frames go into its autoencoder as three equal channels, and come
back as the mean of three (`data.encode`, `data.decode`).
"""

import json
from pathlib import Path

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffecho_utils import DiffEchoError, files, models, prompts

NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
WEIGHTS = {part: f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
WEIGHTS |= {"text_encoder": "text_encoder/model.safetensors"}
_SMALL = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json")
_SMALL += ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt")
FILES = (*_SMALL, "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json")
FILES += tuple(WEIGHTS.values())
_OTHERS = {1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}  # by their prompts' width
_OFFLINE = "; without network copy the pipeline's folder here and name it with --base FOLDER"
_PUBLISHED = {  # Stable Diffusion v1-5, where it differs from its classes' defaults
    "unet": dict(sample_size=64, cross_attention_dim=768),
    "vae": dict(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        sample_size=512,
    ),
    "text_encoder": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ),
}
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention


def folder_of(name, say=print):
    """The folder of the base `name`: itself, or that of a name on the Hub, fetched once.

    What is small comes first and is looked at (`check`), so that a base that cannot be used costs no
    gigabytes. Raises DiffEchoError for a base that is missing, incomplete or of another family, and where
    the Hub cannot be reached.
    """
    if Path(name).is_dir():
        check(name)
        return Path(name)
    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
        if all((folder / path).is_file() for path in WEIGHTS.values()):
            check(folder)
            return folder
    except HFValidationError:
        raise DiffEchoError(f"{name}: no folder, and no name on the Hub (owner/name)") from None
    except OSError:
        pass  # not fetched yet
    try:
        looked_at = Path(hf_hub_download(name, "model_index.json")).parent
        there = set(HfApi().list_repo_files(name))
        for path in there & {*_SMALL}:
            hf_hub_download(name, path)
        _check_parts(name, looked_at, there)
        say(f"fetching {name} from the Hub, once: about 4 GB for Stable Diffusion 1.x")
        folder = Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DiffEchoError(
            f"{name}: cannot be fetched from the Hub ({reason}){_OFFLINE}"
        ) from None
    check(folder)
    return folder


def check(folder):
    """Raise DiffEchoError unless `folder` holds a whole Stable Diffusion 1.x: parts, widths, weights."""
    folder = Path(folder)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    _check_parts(folder, folder, there)
    for path in WEIGHTS.values():
        try:
            with safe_open(folder / path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise DiffEchoError(
                f"{folder / path}: half-written ({error}); copy or fetch it again"
            ) from None


def _check_parts(name, folder, there):
    """The same of a base whose files are `there`, its small ones in `folder`."""

    def read(path):
        return files.read_json(folder / path, "copy or fetch it again")

    if "model_index.json" in there:
        pipeline = read("model_index.json").get("_class_name")
        if pipeline != "StableDiffusionPipeline":
            raise DiffEchoError(
                f"{name}: a {pipeline}; give a Stable Diffusion 1.x (StableDiffusionPipeline)"
            )
    for path in (*_SMALL, *WEIGHTS.values()):
        if path not in there:
            part = path.split("/")[0]
            other = [p for p in there if p.startswith(f"{part}/") and p.endswith((".bin", ".ckpt"))]
            hint = f", only {other[0]}, a pickle" if other and path in WEIGHTS.values() else ""
            raise DiffEchoError(
                f"{name}: no {path}{hint}; a base has {', '.join(NETWORKS)}, tokenizer and scheduler, with "
                "weights as safetensors"
            )
    unet, vae, text = (read(f"{part}/config.json") for part in NETWORKS)
    width = unet.get("cross_attention_dim")
    if width in _OTHERS:
        raise DiffEchoError(
            f"{name}: {_OTHERS[width]}, whose prompts are {width} wide; give a Stable Diffusion 1.x (768)"
        )
    if width != text.get("hidden_size"):
        raise DiffEchoError(
            f"{name}: a UNet for prompts {width} wide, and a text encoder of {text.get('hidden_size')}; "
            "take all parts from one pipeline"
        )
    if not unet.get("in_channels") == unet.get("out_channels") == vae.get("latent_channels"):
        raise DiffEchoError(
            f"{name}: a UNet with {unet.get('in_channels')} channels in and {unet.get('out_channels')} out "
            f"for latents of {vae.get('latent_channels')} (for inpainting?); give the one that draws"
        )


def digest(folder):
    """SHA-256 over the weights of the base in `folder`."""
    return files.digest(Path(folder) / path for path in WEIGHTS.values())


def load(folder, part):
    """The `part` of the base in `folder`, float32, in evaluation mode: one of `NETWORKS`."""
    how = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        network, info = NETWORKS[part].from_pretrained(folder, subfolder=part, **how)
        lost = [*info["missing_keys"], *info["mismatched_keys"]][:1]
    except (RuntimeError, ValueError) as error:
        lost = [str(error).strip().splitlines()[0]]
    if lost:
        raise DiffEchoError(
            f"{folder}/{part}: weights and config.json describe different architectures ({lost[0]}); take "
            "both from one pipeline"
        )
    return network.float().eval()


def published(part):
    """The `part` of Stable Diffusion v1-5 with the weights that torch begins with, on its default device.

    `with torch.device("meta"):` builds the shapes alone, in no memory.
    """
    return _built(part)


def _built(part, **changed):
    """The `part` as published, but for these settings."""
    settings = _PUBLISHED[part] | changed
    if part == "text_encoder":
        return CLIPTextModel(CLIPTextConfig(**settings))
    return NETWORKS[part](**settings)


def load_tokenizer(folder):
    """The CLIPTokenizer of the base in `folder`."""
    return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)


def load_scheduler(folder):
    """The base's noise schedule as DDPMScheduler, sampled from its last timestep on ("trailing")."""
    return DDPMScheduler.from_pretrained(
        folder, subfolder="scheduler", timestep_spacing="trailing", clip_sample=False
    )


def spare(denoiser, recipe):
    """Turn on what `recipe` needs on this card, and say in a line what was chosen.

    Gradient checkpointing on GPUs of less than 30 GB: every block is computed again on the way back
    instead of kept, a third more time for a fraction of the memory.
    """
    if not torch.cuda.is_available():
        return "on the CPU: float32, AdamW"
    card = torch.cuda.get_device_properties(0)
    small = card.total_memory < 30e9
    for network in denoiser.children() if small else ():
        network.enable_gradient_checkpointing()
    half = str(models.half(recipe) or torch.float32).removeprefix("torch.")
    kept = "gradient checkpointing" if small else "no gradient checkpointing"
    size = card.total_memory / 2**30
    return f"{card.name}, {size:.0f} GiB: {half}, {kept}, {models.adam(recipe).__name__}"


class Lora:
    """Low-rank additions to a UNet's attention (Hu et al. 2022), the only weights of it that are trained.

    Saved as diffusers' `pytorch_lora_weights.safetensors`, which `StableDiffusionPipeline.load_lora_weights` reads.
    """

    def __init__(self, unet, rank):
        from peft import LoraConfig  # slow to import

        self.unet = unet
        unet.requires_grad_(False)
        unet.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=rank, target_modules=LORA_LAYERS, init_lora_weights="gaussian"
            )
        )

    def save_pretrained(self, folder):
        """Write what was added, and no more, into `folder`."""
        from peft import get_peft_model_state_dict

        added = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        _pipeline().save_lora_weights(folder, unet_lora_layers=added)


def _pipeline():
    """diffusers' StableDiffusionPipeline, which is slow to import and complains of a missing torchvision."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    from diffusers import StableDiffusionPipeline

    transformers.logging.set_verbosity(before)
    return StableDiffusionPipeline


def tiny(folder):
    """Write a base of a few MB with random weights: the real layout, classes and file names. Returns `folder`.

    It knows nothing and draws noise of 64 pixels; it shows the road, in tests and where no base can be had.
    """
    tokenizer = models.build_tokenizer(prompts.every(), length=77)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        text_encoder = _built(
            "text_encoder",
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        vae = _built("vae", block_out_channels=(32,) * 4, layers_per_block=1, sample_size=64)
        unet = _built(
            "unet",
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
        )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    _pipeline()(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    words = Path(folder) / "tokenizer"  # as those of 2022, in two files
    spelled = json.loads((words / "tokenizer.json").read_text())["model"]
    merges = "\n".join(["#version: 0.2", *map(" ".join, spelled["merges"])])
    (words / "vocab.json").write_text(json.dumps(spelled["vocab"]))
    (words / "merges.txt").write_text(merges)
    (words / "tokenizer.json").unlink()
    return Path(folder)
