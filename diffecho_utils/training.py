"""The one training loop, and the stages that each model is trained in.

Chapters 02 to 06. `fit` knows nothing of images: an objective (a module whose forward returns the
loss) brings the network, and all randomness is a function of (seed, step). So a run that was
interrupted ends with the very weights of one that was not. Two processes train what one process with
twice the batch does, except where a batch is more than its rows: CLIP compares the frames of one
process, batch and spectral normalisation keep statistics, and dropout is each process's own.

    python -m diffecho_utils train autoencoder --data ROOT --profile cpu --out DIR
    accelerate launch -m diffecho_utils train text --data ROOT --autoencoder DIR --clip DIR --out DIR
"""

import copy
import hashlib
import itertools
import json
import math
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.optim.swa_utils import update_bn

from diffecho_utils import (
    DiffEchoError,
    base,
    camus,
    checkpoints,
    data,
    files,
    models,
    objectives,
    prompts,
    sampling,
)

# Small movements only: how bright the samples are is one of the paper's claims, so gain stays as it
# is, and the same for all four generators, so that only the conditioning differs.
JITTER = {"degrees": 4.0, "shift": 0.02, "zoom": 0.04, "gain": 0.0, "contrast": 0.0}
# Which prompts a text model learns from: the paper's, without phase for text + segmentation, and ours.
TRAINING_PROMPTS = ("paper", "paper-seg", "clinical")

# The models and the checkpoints that each builds on.
MODELS = {
    "autoencoder": (),
    "clip": (),
    "unconditional": ("autoencoder",),
    "text": ("autoencoder", "clip"),
    "text-seg": ("text",),
    "sdm": ("autoencoder",),
    "sdm-student": ("autoencoder", "sdm"),
    "small-decoder": ("autoencoder",),
    "segmenter": (),
    "classifier": (),
}
# And what these read there: the paper's prompts; text + segmentation also those that it is drawn with.
ON_A_BASE = {"text": ("paper",), "text-seg": ("paper-seg", sampling.DRAWING_PROMPTS)}


@dataclass(frozen=True)
class Stage:
    """One training of which a model may need several."""

    name: str
    objective: nn.Module  # what is minimised (`objectives`)
    tensors: dict  # what it is trained on, equally long
    recipe: object  # profiles.Recipe
    parts: tuple = ()  # what begins with it and is saved: (subfolder, network, scheduler or tokenizer)


def train(
    model,
    frames,
    profile,
    folder,
    *,
    needs=None,
    start=None,
    minutes=None,
    restart=False,
    seed=0,
    say=print,
    provenance=None,
    cache_dir=None,
    lora=None,
    **settings,
):
    """Train `model`, one of `MODELS`, on `frames` (data.Frames) and save it in `folder`.

    needs: {name: folder} of the checkpoints it builds on (`MODELS`). start: a checkpoint to go on
    from, as fine-tuning does: its weights that have the name and the shape of this model's; default:
    random weights. minutes: as many steps as fit, by the speed of the first ones, instead of the
    recipe's; for a model of several stages, of each. A run that was interrupted in `folder` goes on, if it
    is this one; restart: it is thrown away. say: is given a line of text now and then. lora: rank of
    the low-rank additions that are trained instead of a base's whole UNet (text). `settings` go to the
    objective; templates (text, text-seg): which prompts are read. Returns the log, a DataFrame with a row
    every few steps and the column stage. Raises DiffEchoError for what is missing, and where `folder`
    holds a run that was made from other things.
    """
    folder, needs = Path(folder), _wanted(model, profile, needs or {})
    started_from = start and checkpoints.read_training(start)
    at, on_base = _base(model, profile, lora, say)
    facts = _facts(model, frames, profile, seed) | on_base
    origin = facts | _origin(frames, needs, start, settings)
    torch.manual_seed(seed)
    parts, logs, recipes = [], [], {}
    for stage in _stages(model, frames, profile, needs, at, lora, seed, cache_dir, settings, say):
        state, recipe = folder / "state" / f"{stage.name}.safetensors", stage.recipe
        for subfolder, part in stage.parts:
            if start is not None and isinstance(part, nn.Module):
                say(checkpoints.take_weights(part, Path(start) / subfolder))
        if minutes is not None:
            recipe = _within(minutes, stage, None if restart else state)
            say(f"{stage.name}: {recipe.steps} steps fit in {minutes:g} minutes")
        how = {"restart": restart, "seed": seed, "say": say, "origin": origin}
        log = fit(stage.objective, stage.tensors, recipe, state, **how)
        stage.objective.cpu()
        parts += stage.parts
        logs.append(log.assign(stage=stage.name))
        recipes[stage.name] = asdict(recipe)
    log = pd.concat(logs, ignore_index=True)
    if models.processes().is_main_process:
        if "latents" in stage.tensors:
            facts["latent_side"] = stage.tensors["latents"].shape[-1]
        if start is not None:
            facts["started_from"] = started_from
        facts |= {"recipes": recipes} | _told(log) | (provenance or {})
        checkpoints.save(parts, folder, facts, needs)
    return log


def _within(minutes, stage, state):
    """The stage's recipe with the steps that fit; with those found before, where its run goes on."""
    if state and state.exists():
        steps = _read_state(state)[0]["made_from"]["recipe"]["steps"]
    else:
        steps = steps_within(minutes, stage)
    return replace(stage.recipe, steps=broadcast_object_list([steps])[0])


def builds_on(model, profile):
    """Names of the checkpoints that `model` needs in this profile: none in pixels, none on a base."""
    in_pixels = model == "unconditional" and profile.unconditional_pixels
    return () if in_pixels or (profile.base and model in ON_A_BASE) else MODELS[model]


def _wanted(model, profile, needs):
    """{name: folder} of the checkpoints that `model` builds on; DiffEchoError where one is missing."""
    if model not in MODELS:
        raise DiffEchoError(f"no model {model!r}; train one of {', '.join(MODELS)}")
    names = builds_on(model, profile)
    missing = [name for name in names if name not in needs]
    if missing:
        raise DiffEchoError(
            f"{model} builds on {missing}; train these first, and pass their folders"
        )
    return {name: needs[name] for name in names}


def _base(model, profile, lora, say):
    """(folder, facts) of the base that `model` is fine-tuned on; (None, {}) for a network of our own."""
    if profile.base and model in ON_A_BASE:
        at = base.folder_of(profile.base, say)
        made = {"name": str(profile.base), "sha256": base.digest(at)}
        if lora is None or model == "text":
            return at, {"base": made, "lora": lora}
        raise DiffEchoError(f"LoRA is for the model text; train {model} without --lora")
    if lora:
        raise DiffEchoError(
            "LoRA adds to a base's UNet; name one with --base, or a profile that has one"
        )
    return None, {}


def _facts(model, frames, profile, seed):
    """What a training is one of, for its state and for training.json."""
    table = frames.table
    return {
        "model": model,
        "world": table.attrs.get("world"),
        "profile": profile.name,
        "splits": sorted(table["split"].dropna().unique()),
        "patients": int(table["patient"].nunique()),
        "frames": len(frames),
        "side": frames.side,
        "stretched": frames.stretched,
        "seed": seed,
        "processes": models.processes().num_processes,
    }


def _origin(frames, needs, start, settings):
    """What else fixes a run, beside its recipe: a state that was made from anything else is another's."""
    content = hashlib.sha256(frames.masks.numpy())
    content.update(frames.table[["patient", "view", "phase"]].to_csv(index=False).encode())
    settings = {name: repr(value) for name, value in settings.items()}
    origin = {"frames": content.hexdigest()[:16], "settings": settings}
    folders = needs if start is None else needs | {"start": start}
    return origin | {name: checkpoints.weights_digest(at)[:16] for name, at in folders.items()}


def _told(log):
    """What training.json says of how it went: minutes, memory, the loss curve of each stage."""
    gpu = torch.cuda.is_available()
    return {
        "minutes": round(log["seconds"].sum() / 60, 1),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None,
        "log": {
            stage: rows.drop(columns="stage").dropna(axis="columns").round(5).to_dict("records")
            for stage, rows in log.groupby("stage", sort=False)
        },
    }


def _stages(model, frames, profile, needs, at, lora, seed, cache_dir, settings, say):
    """The stages of `model`: generated one by one, as a later one may need what an earlier one trained."""
    if model == "autoencoder":
        return _autoencoder(frames, profile, settings)
    if model == "clip":
        return _clip(frames, profile, settings)
    if model in ("segmenter", "classifier"):
        return _judge(model, frames, profile, settings)
    if at is not None:
        vae = base.load(at, "vae").to(models.device())
    elif needs:
        folder = needs.get("autoencoder") or checkpoints.needed(needs["text"], "autoencoder")
        vae = checkpoints.load_autoencoder(folder).to(models.device())
        _check_latents(vae, folder, frames, profile)
    else:
        vae, frames = None, _shrunk(frames, profile.unconditional_pixels)
    with models.processes().main_process_first():  # the others find the cache
        views = data.latent_views(vae, frames, profile.jittered_views, seed, cache_dir, **JITTER)
    if model == "unconditional":
        return _unconditional(frames, profile, views, settings)
    if model == "sdm":
        return _sdm(profile, views, settings)
    if model == "sdm-student":
        return _student(profile, views, needs["sdm"], seed, cache_dir, settings, say)
    if model == "small-decoder":
        return _small_decoder(vae, profile, views, settings)
    return _text(model, frames, profile, views, needs, at, lora, settings, say)


def _autoencoder(frames, profile, settings):
    vae, discriminator = models.build_autoencoder(profile), models.build_discriminator()
    tensors = {"images": frames.images}
    objective = objectives.ReconstructionObjective(vae, profile.crop)
    yield Stage("reconstruction", objective, tensors, profile.reconstruction, [("", vae)])
    objective = objectives.TextureObjective(vae, discriminator, profile.crop, **settings)
    yield Stage("texture", objective, tensors, profile.texture)
    deviation = data.encode(vae, frames.images[:: max(1, len(frames) // 400)]).std().item()
    vae.register_to_config(scaling_factor=1 / deviation)


def _clip(frames, profile, settings):
    tokenizer = models.build_tokenizer(prompts.every())
    clip = models.build_clip(profile, tokenizer)
    texts, ids = data.prompt_table(frames, TRAINING_PROMPTS)
    objective = objectives.ContrastiveObjective(clip, models.tokens(tokenizer, texts), **settings)
    tensors = {"images": frames.images, "masks": frames.masks, "prompts": ids}
    yield Stage("clip", objective, tensors, profile.clip, [("", clip), ("", tokenizer)])


def _judge(model, frames, profile, settings):
    """A network that reads frames, real or generated: what chapters 02 to 08 measure with."""
    tensors = {"images": frames.images, "masks": frames.masks}
    if model == "segmenter":
        network, recipe = models.build_segmenter(profile), profile.segmenter
        objective = objectives.SegmentationObjective(network, **settings)
    else:
        network, recipe = models.build_classifier(profile), profile.classifier
        objective = objectives.ClassificationObjective(network, **settings)
        tensors["labels"] = frames.classes
    yield Stage(model, objective, tensors, recipe, [("", network)])


def _unconditional(frames, profile, views, settings):
    """One network a class, as in the paper; of the classes that there are frames of.

    Where the profile has a recipe `shared`, a network of all classes is trained first: the four begin with it.
    """
    recipe = profile.unconditional
    scheduler = models.build_scheduler(recipe.prediction)
    shared = None
    if profile.shared:
        shared = models.build_unconditional(profile)
        tensors, denoiser = {"latents": views["latents"]}, models.Unconditional([shared])
        objective = _diffusion(denoiser, scheduler, profile.shared, settings)
        yield Stage("shared", objective, tensors, profile.shared, [("shared", shared)])
    classes = frames.classes.repeat(len(views["latents"]) // len(frames))
    for index, name in enumerate(camus.CLASS_NAMES):
        unet = copy.deepcopy(shared) or models.build_unconditional(profile)
        if not (classes == index).any():
            continue
        objective = _diffusion(models.Unconditional([unet]), scheduler, recipe, settings)
        tensors = {"latents": views["latents"][classes == index]}
        yield Stage(name, objective, tensors, recipe, [(name, unet), ("scheduler", scheduler)])


def _sdm(profile, views, settings):
    unet, scheduler = models.build_sdm(profile), models.build_scheduler(profile.sdm.prediction)
    objective = _diffusion(models.SemanticDiffusion(unet), scheduler, profile.sdm, settings)
    yield Stage("sdm", objective, views, profile.sdm, [("unet", unet), ("scheduler", scheduler)])


def _student(profile, views, teacher, seed, cache_dir, settings, say):
    """The SDM once more, from its own weights, on one straight road for each of as many pairs as there are views."""
    generator = checkpoints.load_generator(teacher).to(models.device())
    network, scheduler = generator.denoiser, generator.scheduler
    tensors = {"masks": views["masks"]} | _pairs(
        teacher, generator, views["masks"], profile, seed, cache_dir, say
    )
    unet, side = network.unet, generator.latent_shape[-1]
    parts = [("unet", unet), ("scheduler", scheduler)]
    objective = objectives.ReflowObjective(network, scheduler)
    yield Stage("reflow", objective, tensors, profile.reflow, parts)
    channels = (64, 96)[: side.bit_length() - 2]
    inputs = profile.latent_channels + len(camus.LABELS)
    discriminator = models.build_discriminator(channels, inputs)
    objective = objectives.ReflowObjective(network, scheduler, discriminator, **settings)
    yield Stage("speckle", objective, tensors | {"known": views["latents"]}, profile.speckle)


def _pairs(teacher, generator, masks, profile, seed, cache_dir, say, at_once=800):
    """A pair of `sampling.pairs` for each label map, kept in pieces, so that what was interrupted goes on."""
    made = checkpoints.weights_digest(teacher)
    steps, pieces = profile.sampling_steps // 2, masks.split(at_once)  # as good as all (chapter 07)
    found = []
    for i, part in enumerate(pieces):
        first = 2**31 + seed * len(masks) + i * at_once  # no drawn set's
        seeds = range(first, first + len(part))
        key = [made, data.digest([part]), steps, generator.guidance, first]
        make = partial(sampling.pairs, generator, seeds, steps, masks=part)
        found.append(files.cached(cache_dir, "pairs", key, make))
        say(f"pairs of noise and picture: {sum(len(x['noise']) for x in found)} of {len(masks)}")
    return {name: torch.cat([piece[name] for piece in found]) for name in found[0]}


def _small_decoder(vae, profile, views, settings):
    """A decoder of a few per cent of the large one's cost, after that one's pictures."""
    small = models.build_small_decoder(profile)
    images = data.decode(vae, views["latents"])
    tensors = {"latents": views["latents"], "images": ((images + 1) * 127.5).round().byte()}
    objective = objectives.DecoderObjective(small, **settings)
    yield Stage("small_decoder", objective, tensors, profile.small_decoder, [("", small)])


def _text(model, frames, profile, views, needs, at, lora, settings, say):
    """The text model; or, on a frozen one, its ControlNet.

    On a base (its folder: `at`) Stable Diffusion's own UNet, whole or by LoRA, or a ControlNet on it, as in
    the paper; else networks of our own.
    """
    templates = settings.pop("templates", ON_A_BASE[model] if at else TRAINING_PROMPTS)
    texts, ids = data.prompt_table(frames, templates)
    copies = len(views["latents"]) // len(frames)
    tensors = {"latents": views["latents"], "prompts": ids.repeat(copies, 1)}
    if at:
        encoder = checkpoints.TextEncoder(base.load(at, "text_encoder"), base.load_tokenizer(at))
        unet, scheduler = base.load(at, "unet"), base.load_scheduler(at)
    elif model == "text":
        encoder = checkpoints.load_text_encoder(needs["clip"])
        unet = models.build_text_unet(profile)
        scheduler = models.build_scheduler(profile.text.prediction)
    else:
        frozen = checkpoints.load_generator(needs["text"])
        encoder, unet, scheduler = frozen.text, frozen.denoiser.unet, frozen.scheduler
    if model == "text":
        denoiser, recipe, parts = models.TextGuided(unet), profile.text, [("unet", unet)]
        parts += [] if at else [("scheduler", scheduler)]
    else:
        hint = (16, 32, 96, 256) if at else (8, 16, 32, 64)
        controlnet = models.build_controlnet(unet, hint)
        denoiser, recipe = models.TextSegmentationGuided(unet, controlnet), profile.text_seg
        tensors["masks"], parts = views["masks"], [("controlnet", controlnet)]
    if lora and model == "text":
        recipe, parts = profile.lora, [("", base.Lora(unet, lora))]
    recipe = replace(recipe, prediction=scheduler.config.prediction_type)
    if at:
        say(base.spare(denoiser, recipe))
    objective = _diffusion(denoiser, scheduler, recipe, settings, encoder(texts))
    yield Stage(model, objective, tensors, recipe, parts)


def _diffusion(denoiser, scheduler, recipe, settings, states=None):
    settings = {"snr_gamma": recipe.snr_gamma} | settings
    return objectives.DiffusionObjective(denoiser, scheduler, states, **settings)


def _shrunk(frames, side):
    """The frames at another side, for models that diffuse pixels."""
    masks = F.interpolate(frames.masks[:, None], (side, side), mode="nearest-exact")[:, 0]
    return data.Frames(data.resized(frames.images, side), masks, frames.table)


def _check_latents(vae, folder, frames, profile):
    side = profile.side // models.autoencoder_factor(profile)
    given, expected = models.latent_shape(vae, frames.side), (profile.latent_channels, side, side)
    if given != expected:
        raise DiffEchoError(
            f"{folder}: gives latents {given}, while profile {profile.name} expects {expected}; train "
            "an autoencoder with this profile, or choose that one's"
        )


def steps_within(minutes, stage):
    """Steps of a `Stage` that take so many minutes here: 9 tenths of what 30 steps of a copy tell."""
    copied, seconds = copy.deepcopy(stage.objective), []
    for steps in (5, 30):  # the first steps are slow and do not count
        started = time.monotonic()
        brief = replace(stage.recipe, steps=steps, warmup=1)
        fit(copied, stage.tensors, brief, None, say=lambda line: None)
        seconds.append(time.monotonic() - started)
    return max(1, int(0.9 * (60 * minutes - sum(seconds)) / (seconds[1] / 30)))


def fit(
    objective, tensors, recipe, state, *, restart=False, seed=0, say=print, watch=None, origin=None
):
    """Train `objective` for `recipe.steps` steps; its network ends with the averaged (EMA) weights.

    objective: module with `network`, `draw(batch, generator)` -> dict of random tensors, and
    `forward(**batch, **drawn)` -> (loss, its parts); tensors: dict of equally long tensors, whose rows
    make the batches; state: file (safetensors) of the resumable state, or None to keep none; a run that
    left one there goes on from it, unless `restart`. say: is given a line of text now and then. watch:
    (steps, look); after each of those steps `look(step)` finds the averaged weights in the network.
    origin: names and values that the state's run must share. The caller's random numbers stay as they are.

    Returns a DataFrame: step, loss and its parts, gradient_norm (before clipping), learning_rate,
    images_per_second, seconds. Raises DiffEchoError for a loss or a gradient that is not finite (the last
    good state stays), for a state of another run, and for want of memory.
    """
    run = _Run(objective, tensors, recipe, seed, origin or {})
    say = say if run.accelerator.is_main_process else str  # which says nothing
    if state is not None and not restart and Path(state).exists():
        run.load(state)
        say(f"resumed at step {run.step} of {recipe.steps}")
    model, optimizer, accelerator = run.prepare()
    log, gpus = _Log(run), [accelerator.device] if accelerator.device.type == "cuda" else []
    with _in_words(run, state, say), torch.random.fork_rng(gpus):
        while run.step < recipe.steps:
            rate = learning_rate(run.step, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate
            own = 2**40 * (1 + accelerator.process_index)  # each process drops out other units
            torch.manual_seed(own + _seed(seed, 0, run.step))
            for batch in run.batches(run.step):
                with accelerator.accumulate(model):
                    with torch.autocast(accelerator.device.type, run.half, run.half is not None):
                        loss, parts = model(**batch)
                    accelerator.backward(loss)
                    log.add({"loss": loss} | parts, recipe.accumulation)
                    if accelerator.sync_gradients:  # with the last piece of the batch
                        norm = accelerator.clip_grad_norm_(run.trained, recipe.clip)
                    optimizer.step()
                    if accelerator.sync_gradients and not optimizer.step_was_skipped:
                        log.add({"gradient_norm": norm})  # float16 skips what was scaled too much
                    optimizer.zero_grad()
            run.ema.step(run.averaged)
            run.step += 1
            if watch is not None and run.step in watch[0]:
                log.began += run.look(watch[1])
            saves = run.step == recipe.steps or run.step % recipe.save_every == 0
            if saves or 20 * (run.step - log.since) >= recipe.steps:
                say(log.row(rate, state))
            if saves and state is not None:
                run.save(state)
        run.take_averages()
    objective.to(memory_format=torch.contiguous_format)
    accelerator.wait_for_everyone()
    return pd.DataFrame(run.rows)


def learning_rate(step, recipe):
    """Linear warm-up to the recipe's rate, then constant or half a cosine down to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class _Run:
    """A training under way: what changes from step to step, and so what its state file keeps."""

    def __init__(self, objective, tensors, recipe, seed, origin):
        models.processes()
        self.half = models.half(recipe)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            # The recipe says it, and not the environment; only float16 needs more than autocast
            mixed_precision="fp16" if self.half == torch.float16 else "no",
            gradient_accumulation_steps=recipe.accumulation,
        )
        self.objective, self.tensors, self.recipe, self.seed = objective, tensors, recipe, seed
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        self.averaged = [p for p in objective.network.parameters() if p.requires_grad]
        settings = {"betas": (recipe.beta1, 0.999), "weight_decay": recipe.weight_decay}
        adam = models.adam(recipe)
        self.optimizer = adam(self.trained, recipe.learning_rate, **settings)
        self.ema = EMAModel(self.averaged, decay=recipe.ema, foreach=True)
        processes = self.accelerator.num_processes
        self.origin = {"recipe": asdict(recipe), "processes": processes, "seed": seed} | origin
        self.step, self.saved, self.rows = 0, 0, []

    def prepare(self):
        """(objective, optimizer, accelerator), everything on this process's device."""
        device = self.accelerator.device
        self.objective.to(memory_format=torch.channels_last)  # convolutions are faster in it
        model, self.optimizer = self.accelerator.prepare(self.objective, self.optimizer)
        self.ema.to(device)
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        self.objective.train()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return model, self.optimizer, self.accelerator

    def batches(self, step):
        """This process's share of the step's global batch, in `accumulation` pieces.

        All steps together go through one endless list of rows: one epoch after the other, each in an
        order of its own. Which of them a step takes, and all that is drawn for it, depends on the seed
        and the step alone; so it is the same in a run that was interrupted, and for any number of processes.
        """
        recipe, device = self.recipe, self.accelerator.device
        pieces = recipe.accumulation * self.accelerator.num_processes
        size, n = recipe.batch * pieces, len(next(iter(self.tensors.values())))
        start, end = step * size, (step + 1) * size  # in the endless list
        epochs = range(start // n, (end - 1) // n + 1)
        orders = [torch.randperm(n, generator=_generator(self.seed, 1, epoch)) for epoch in epochs]
        rows = torch.cat(orders)[start % n :][:size].to(device)
        batch = {name: tensor[rows] for name, tensor in self.tensors.items()}
        drawn = self.objective.draw(batch, _generator(self.seed, 0, step))
        batch |= {name: tensor.to(device) for name, tensor in drawn.items()}
        own = self.accelerator.process_index * recipe.accumulation
        for piece in range(own, own + recipe.accumulation):
            part = slice(piece * recipe.batch, (piece + 1) * recipe.batch)
            yield {name: tensor[part] for name, tensor in batch.items()}

    def take_averages(self):
        """Give the network its averaged weights, in evaluation mode.

        Batch normalisation's statistics belong to the weights they were taken with: for the averaged
        ones they are taken anew, over 16 batches of the training tensors.
        """
        self.ema.copy_to(self.averaged)
        steps = range(-(-16 // self.recipe.accumulation))
        chosen = itertools.chain.from_iterable(map(self.batches, steps))
        update_bn(chosen, _Told(self.objective))  # takes none where the network has no such layer
        self.objective.network.eval()

    def look(self, look):
        """Call look(step) with the averaged weights in the network; returns the seconds it took."""
        began, network = time.monotonic(), self.objective.network
        before = copy.deepcopy(network.state_dict())
        self.take_averages()
        look(self.step)
        network.load_state_dict(before)
        self.objective.train()
        return time.monotonic() - began

    def save(self, path):
        """Write weights, optimiser and averages, and in the header the rest, as one file, whole or not."""
        if self.accelerator.is_main_process:
            tensors = {f"objective.{k}": v for k, v in self.objective.state_dict().items()}
            tensors |= {f"ema.{i}": v for i, v in enumerate(self.ema.shadow_params)}
            for i, values in self.optimizer.state_dict()["state"].items():
                values = {k: torch.as_tensor(v) for k, v in values.items()}
                tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            facts = {"step": self.step, "made_from": self.origin, "log": self.rows}
            facts["ema_steps"] = self.ema.optimization_step
            facts["scaler"] = self.accelerator.scaler and self.accelerator.scaler.state_dict()
            files.save_tensors(path, tensors, {"facts": json.dumps(facts)})
        self.saved = self.step

    def load(self, path):
        """Undo `save`; DiffEchoError for the state of another run."""
        facts, tensors = _read_state(path)
        _check_same_run(path, facts["made_from"], json.loads(json.dumps(self.origin)))

        def under(prefix):
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.objective.load_state_dict(under("objective."))
        except RuntimeError as error:
            raise DiffEchoError(
                f"{path}: of another architecture ({error}); name another folder, or begin again "
                "with --restart (restart=True)"
            ) from None
        self.ema.shadow_params = [tensors[f"ema.{i}"] for i in range(len(self.averaged))]
        self.ema.optimization_step = facts["ema_steps"]
        state = {i: under(f"optimizer.{i}.") for i in range(len(self.trained))}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        if facts.get("scaler"):
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.step = self.saved = facts["step"]
        self.rows = facts["log"]


class _Told(nn.Module):
    """An objective that takes its batch as one dict, as torch's `update_bn` hands it on."""

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, batch):
        return self.objective(**batch)


class _Log:
    """The rows of a run's log: means of the steps since the last one, and how fast it went."""

    def __init__(self, run):
        self.run = run
        self._begin()

    def _begin(self):
        self.totals, self.since, self.began = {}, self.run.step, time.monotonic()

    def add(self, values, pieces=1):
        """Count a step's values (0-d tensors); pieces: into how many its batch is cut."""
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value.detach() / pieces

    def row(self, rate, state):
        """Add a row, unless what it says is not finite (DiffEchoError); returns it as a line of text."""
        run, recipe = self.run, self.run.recipe
        steps, seconds = run.step - self.since, time.monotonic() - self.began
        row = {"step": run.step}
        row |= {name: float(total) / steps for name, total in self.totals.items()}
        images = steps * recipe.batch * recipe.accumulation * run.accelerator.num_processes
        row |= {"learning_rate": rate, "images_per_second": images / seconds, "seconds": seconds}
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(row[name]):
                raise DiffEchoError(
                    f"the {name.replace('_', ' ')} is {row[name]} between steps {self.since + 1} and "
                    f"{run.step}; {state or 'no state'} keeps the last good state: lower the learning "
                    f"rate ({recipe.learning_rate:g}) and begin again"
                )
        run.rows.append(row)
        self._begin()
        left = (recipe.steps - run.step) * seconds / steps
        return (
            f"step {run.step:>5}/{recipe.steps}  loss {row['loss']:.4f}  "
            f"{row['images_per_second']:.0f} images/s  {left / 60:.1f} min left"
        )


@contextmanager
def _in_words(run, state, say):
    """Say in words what an interruption leaves, and what to do where memory ends."""
    try:
        yield
    except RuntimeError as error:
        # A GPU's OutOfMemoryError is one, a CPU's has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        raise DiffEchoError(
            f"out of memory in step {run.step + 1} with {run.recipe.batch} images at once on "
            f"{run.accelerator.device}; halve the batch (--batch) and double the recipe's accumulation, "
            f"or take a smaller profile; {state or 'no state'} keeps the last good state"
        ) from error
    except KeyboardInterrupt:
        kept = f"{state} keeps step {run.saved}; the same command goes on from there"
        kept = kept if run.saved else "nothing was saved before it"
        if state is not None:
            say(f"interrupted at step {run.step}; {kept}")
        raise


def _seed(seed, stream, index):
    """A seed for each (seed, stream, index): stream 0 is a step's draws, 1 an epoch's order."""
    return (seed * 2 + stream) * 1_000_003 + index


def _generator(*which):
    """Random numbers of their own for each `_seed`, the same on every device."""
    return torch.Generator().manual_seed(_seed(*which))


def _read_state(path):
    """(facts, tensors) of a state; DiffEchoError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return facts, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise DiffEchoError(
            f"{path}: damaged ({error}); begin again with --restart (restart=True)"
        ) from None


def _check_same_run(path, old, new):
    old, new = (known | known["recipe"] for known in (old, new))
    changed = [
        f"{name} ({old.get(name)}, now {new.get(name)})"
        for name in old | new
        if name != "recipe" and old.get(name) != new.get(name)
    ]
    if changed:
        raise DiffEchoError(
            f"{path}: holds a run with another {', '.join(changed)}; repeat that command to go on, name "
            "another folder, or begin again with --restart (restart=True)"
        )
