"""What fine-tuning Stable Diffusion takes, at 512 px: parameters, memory, hours. Estimated; measured on a GPU.

Sizes come from the networks of the published configuration on torch's meta device, which has shapes and no
values: what the way back keeps is counted as it is kept. On a GPU the same networks, with random weights, are
trained for a few steps, within 16 GB where the card has more: speed does not depend on what weights are.
"""

import time
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffecho_utils import assets, base, models, profiles, results

WORLD, SEEDS, SPLIT = "phantom", [], None
# Dense half-precision TFLOP a second and GB, of the makers' data sheets.
CARDS = {"T4": (65, 16), "L4": (121, 24), "A100": (312, 40), "H100": (989, 80)}
REACHED = 0.3  # the share of it that such trainings reach, a rule of thumb
LIMIT = 16e9
RANK = 16
WAYS = {"whole UNet": "text", f"LoRA, rank {RANK}": "lora", "ControlNet": "text_seg"}


def build(way):
    """The denoiser of one of `WAYS`, as `training` builds it on a base."""
    unet = base.published("unet")
    if WAYS[way] == "text_seg":
        return models.TextSegmentationGuided(
            unet, models.build_controlnet(unet, hint=(16, 32, 96, 256))
        )
    if WAYS[way] == "lora":
        base.Lora(unet, RANK)
    return models.TextGuided(unet)


def forward(denoiser, way, dtype, device):
    """The mean square of its answer to one latent of a 512 px frame."""
    latents = torch.zeros(1, 4, 64, 64, dtype=dtype, device=device)
    given = {"text": torch.zeros(1, 77, 768, dtype=dtype, device=device)}
    timesteps = torch.zeros(1, dtype=torch.long, device=device)
    if WAYS[way] == "text_seg":
        given["masks"] = torch.zeros(1, 512, 512, dtype=torch.uint8, device=device)
    return denoiser(latents, timesteps, **given).float().square().mean()


def blank(masks):
    """ControlNet's picture of a label map where there are no values to look at."""
    return torch.zeros(len(masks), 3, *masks.shape[1:], dtype=torch.half, device=masks.device)


def estimated(way, checkpointing):
    """GiB and TFLOP of one step on one image in half precision, from shapes alone."""
    with torch.device("meta"):
        denoiser = build(way).half().train()
    for network in denoiser.children() if checkpointing else ():
        network.enable_gradient_checkpointing()
    own, kept = {p.untyped_storage()._cdata for p in denoiser.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(denoiser, way, torch.half, "meta")
    activations = sum(t.untyped_storage().nbytes() for k, t in kept.items() if k not in own)
    with FlopCounterMode(display=False) as counted:
        forward(denoiser, way, torch.half, "meta").backward()
    total = models.count_parameters(denoiser)
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    parts = {
        "weights": 4 * total + 2 * trained,  # float32, and autocast's copies
        "gradients": 4 * trained,
        "Adam": 8 * trained,
        "averages": 4 * trained,
        "activations": activations,
    }
    gib = {name: size / 2**30 for name, size in parts.items()}
    eight_bit = sum(gib.values()) - 0.75 * gib["Adam"]
    return {
        "parameters": total,
        "trained": trained,
        "gib": gib | {"in all": sum(gib.values()), "in all, 8-bit Adam": eight_bit},
        "tflop_an_image": counted.get_total_flops() / 1e12,
    }


def hours(way, tflop):
    """{card: (images a second, hours for the recipe's steps)} at the share of its speed that is `REACHED`."""
    recipe = getattr(profiles.get("paper"), WAYS[way])
    images = recipe.steps * recipe.batch * recipe.accumulation
    speeds = {card: REACHED * speed / tflop for card, (speed, _) in CARDS.items()}
    return {card: (speed, images / speed / 3600) for card, speed in speeds.items()}


def measured(way, steps=10):
    """Images a second and GiB at most on this GPU, held to `LIMIT`."""
    card = torch.cuda.get_device_properties(0)
    torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT / card.total_memory))
    recipe = getattr(profiles.get("paper"), WAYS[way])
    denoiser = build(way).cuda().train()
    for network in denoiser.children():
        network.enable_gradient_checkpointing()
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = models.adam(recipe)(trained, recipe.learning_rate)
    torch.cuda.reset_peak_memory_stats()
    for step in range(steps + 3):
        if step == 3:  # the first are slow
            torch.cuda.synchronize()
            began = time.monotonic()
        with torch.autocast("cuda", models.half(recipe)):
            loss = forward(denoiser, way, torch.float32, "cuda")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    seconds = time.monotonic() - began
    return {
        "images_a_second": steps / seconds,
        "gib": torch.cuda.max_memory_allocated() / 2**30,
        "adam": models.adam(recipe).__name__,
        "half": str(models.half(recipe)),
    }


def rows(world):
    return {way: {"way": way, "machine": results.hardware()} for way in WAYS}


def compute(world, way, machine):
    with mock.patch.object(models, "control_image", blank):
        kept, again = (estimated(way, checkpointing) for checkpointing in (False, True))
    found = {"kept": kept, "checkpointed": again, "hours": hours(way, again["tflop_an_image"])}
    if torch.cuda.is_available():
        try:
            found["measured"] = measured(way)
        except torch.OutOfMemoryError:
            found["measured"] = f"does not fit {LIMIT / 1e9:.0f} GB"
        torch.cuda.empty_cache()
    return found


def collect(world, found):
    """Not of any data: the record lies beside those of the worlds, under "hardware"."""
    with torch.device("meta"):
        sizes = {part: models.count_parameters(base.published(part)) for part in base.NETWORKS}
    values = {
        "ways": found,
        "published": sizes,
        "cards": CARDS,
        "reached": REACHED,
        "limit_gb": LIMIT / 1e9,
    }
    folder = assets.root() / "data" / "results" / "hardware" / "paper"
    facts = {"world": "hardware", "profile": "paper", "split": SPLIT}
    command = "python experiments/run.py paper_scale"
    print("wrote", results.save(folder, "paper_scale", values, command=command, **facts))
    return {}
