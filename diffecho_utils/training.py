"""The one training loop, and what it minimises for each network.

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
    camus,
    checkpoints,
    data,
    files,
    models,
    objectives,
    prompts,
)

# Small movements only: how bright the samples are is one of the paper's claims, so gain stays as it
# is, and the same for all four generators, so that only the conditioning differs.
JITTER = {"degrees": 4.0, "shift": 0.02, "zoom": 0.04, "gain": 0.0, "contrast": 0.0}
# Which prompts a text model reads: the paper's, without phase for text + segmentation, and ours.
TEMPLATES = ("paper", "paper-seg", "clinical")


# The models and the checkpoints that each builds on.
MODELS = {
    "autoencoder": (),
    "clip": (),
    "unconditional": ("autoencoder",),
    "text": ("autoencoder", "clip"),
    "text-seg": ("text",),
    "sdm": ("autoencoder",),
    "segmenter": (),
    "classifier": (),
}


@dataclass(frozen=True)
class Stage:
    """One training of which a model may need several: what is minimised, on which tensors, and how."""

    name: str
    objective: nn.Module
    tensors: dict
    recipe: object  # profiles.Recipe


def train(
    model,
    frames,
    profile,
    folder,
    *,
    needs=None,
    restart=False,
    provenance=None,
    progress=print,
    seed=0,
    cache_dir=None,
    minutes=None,
    start=None,
    **settings,
):
    """Train `model`, one of `MODELS`, on `frames` (data.Frames) and save it in `folder`.

    A run that was interrupted in `folder` goes on, if it is this one; restart: it is thrown away.
    minutes: as many steps as fit, by the speed of the first ones, instead of the recipe's; for a
    model of several stages, of each. start: a checkpoint to go on from, as fine-tuning does: its
    weights that have the name and the shape of this model's; default: random weights. needs: {name:
    folder} of the checkpoints it builds on: "autoencoder" (unconditional, text, sdm), "clip" (text),
    "text" (text-seg, which takes the autoencoder and CLIP from there). `settings` go to the
    objective. Returns the log, a DataFrame with a row every few steps and the column stage. Raises
    DiffEchoError for what is missing, and where `folder` holds a run that was made from other things.
    """
    folder, needs = Path(folder), dict(needs or {})
    wanted = _wanted(model, profile, needs)
    started = None if start is None else checkpoints.read_training(start)
    made_from = _made_from(model, frames, seed, wanted, start, settings)
    torch.manual_seed(seed)
    parts, logs, recipes, begun = [], [], {}, []
    for stage in _stages(model, frames, profile, parts, needs, seed, cache_dir, settings):
        state = folder / "state" / f"{stage.name}.safetensors"
        network, known = stage.objective.network, None if restart else _known(state)
        if start is not None and known is None and not any(network is n for n in begun):
            part = Path(start) / stage.name  # one of several networks, or the only one
            progress(checkpoints.take_weights(network, part if part.is_dir() else start))
        begun.append(network)  # a later stage goes on with it
        recipe = stage.recipe
        if minutes is not None:
            steps = known["recipe"]["steps"] if known else steps_within(minutes, stage)
            recipe = replace(recipe, steps=broadcast_object_list([steps])[0])
            progress(f"{stage.name}: {recipe.steps} steps fit in {minutes:g} minutes")
        log = fit(
            stage.objective,
            stage.tensors,
            recipe,
            state,
            restart=restart,
            progress=progress,
            seed=seed,
            made_from=made_from,
        )
        stage.objective.cpu()
        logs.append(log.assign(stage=stage.name))
        recipes[stage.name] = recipe
    log = pd.concat(logs, ignore_index=True)
    training = _training(model, frames, profile, recipes, log, provenance, seed)
    if model in models.GENERATORS:
        training["latent_side"] = stage.tensors["latents"].shape[-1]
    if started is not None:
        training["started_from"] = started
    if models.processes().is_main_process:
        checkpoints.save(parts, folder, training, wanted)
    return log


def builds_on(model, profile):
    """Names of the checkpoints that `model` needs in this profile: models of pixels need none."""
    in_pixels = model == "unconditional" and profile.unconditional_pixels
    return () if in_pixels else MODELS[model]


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


def _made_from(model, frames, seed, needs, start, settings):
    """What fixes a run beside its recipe: a state that was made from anything else is another run's."""
    table, content = frames.table, hashlib.sha256(frames.masks.numpy())
    content.update(table[["patient", "view", "phase"]].to_csv(index=False).encode())
    return {
        "model": model,
        "seed": seed,
        "world": table.attrs.get("world"),
        "splits": _splits(table),
        "stretched": frames.stretched,
        "frames": content.hexdigest()[:16],
        "start": start and checkpoints.weights_digest(start)[:16],
        "settings": {name: repr(value) for name, value in settings.items()},
    } | {name: checkpoints.weights_digest(folder)[:16] for name, folder in needs.items()}


def _stages(model, frames, profile, parts, needs, seed, cache_dir, settings):
    """The trainings of `model`, each to be run before the next is asked for.

    What is to be saved is appended to `parts`: pairs of a subfolder and a network.
    """
    if model == "autoencoder":
        return _autoencoder(frames, profile, parts, settings)
    if model == "clip":
        return _clip(frames, profile, parts, settings)
    if model in ("segmenter", "classifier"):
        return _judge(model, frames, profile, parts, settings)
    if not builds_on(model, profile):
        vae, frames = None, _shrunk(frames, profile.unconditional_pixels)
    else:
        folder = needs.get("autoencoder") or checkpoints.needed(needs["text"], "autoencoder")
        vae = checkpoints.load_autoencoder(folder).to(models.device())
        _check_latents(vae, folder, frames, profile)
    with models.processes().main_process_first():  # the others find the cache
        views = data.latent_views(vae, frames, profile.jittered_views, seed, cache_dir, **JITTER)
    if model == "unconditional":
        return _unconditional(frames, profile, views, parts, settings)
    if model == "sdm":
        return _sdm(profile, views, parts, settings)
    return _text(model, frames, profile, views, needs, parts, settings)


def _autoencoder(frames, profile, parts, settings):
    vae, discriminator = models.build_autoencoder(profile), models.build_discriminator()
    tensors = {"images": frames.images}
    objective = objectives.ReconstructionObjective(vae, profile.crop)
    yield Stage("reconstruction", objective, tensors, profile.autoencoder)
    objective = objectives.TextureObjective(vae, discriminator, profile.crop, **settings)
    yield Stage("texture", objective, tensors, profile.texture)
    deviation = data.encode(vae, frames.images[:: max(1, len(frames) // 400)]).std().item()
    vae.register_to_config(scaling_factor=1 / deviation)
    parts.append(("", vae))


def _clip(frames, profile, parts, settings):
    tokenizer = models.build_tokenizer(prompts.every())
    clip = models.build_clip(profile, tokenizer)
    texts, ids = data.prompt_table(frames, TEMPLATES)
    objective = objectives.ContrastiveObjective(clip, models.tokens(tokenizer, texts), **settings)
    tensors = {"images": frames.images, "masks": frames.masks, "prompts": ids}
    yield Stage("clip", objective, tensors, profile.clip)
    parts += [("", clip), ("", tokenizer)]


def _judge(model, frames, profile, parts, settings):
    """A network that reads frames, real or generated: what chapters 02 to 08 measure with."""
    tensors = {"images": frames.images, "masks": frames.masks}
    if model == "segmenter":
        network, recipe = models.build_segmenter(profile), profile.segmentation
        yield Stage(model, objectives.SegmentationObjective(network, **settings), tensors, recipe)
    else:
        network, recipe = models.build_classifier(profile), profile.classification
        tensors["labels"] = frames.classes
        yield Stage(model, objectives.ClassificationObjective(network, **settings), tensors, recipe)
    parts.append(("", network))


def _unconditional(frames, profile, views, parts, settings):
    """One network a class, as in the paper; of the classes that there are frames of."""
    recipe = profile.unconditional
    scheduler = models.build_scheduler(recipe.prediction)
    parts.append(("scheduler", scheduler))
    classes = frames.classes.repeat(len(views["latents"]) // len(frames))
    for index, name in enumerate(camus.CLASS_NAMES):
        unet = models.build_unconditional(profile)
        if not (classes == index).any():
            continue
        objective = _diffusion(models.Unconditional([unet]), scheduler, recipe, settings)
        yield Stage(name, objective, {"latents": views["latents"][classes == index]}, recipe)
        parts.append((name, unet))


def _sdm(profile, views, parts, settings):
    unet, scheduler = models.build_sdm(profile), models.build_scheduler(profile.sdm.prediction)
    objective = _diffusion(models.SemanticDiffusion(unet), scheduler, profile.sdm, settings)
    yield Stage("sdm", objective, views, profile.sdm)
    parts += [("unet", unet), ("scheduler", scheduler)]


def _text(model, frames, profile, views, needs, parts, settings):
    """The text model; or, on the frozen one in the folder needs["text"], its ControlNet."""
    settings = dict(settings)
    texts, ids = data.prompt_table(frames, settings.pop("templates", TEMPLATES))
    clip = needs["clip"] if model == "text" else checkpoints.needed(needs["text"], "clip")
    states = checkpoints.TextEncoder(clip)(texts)
    tensors = {"latents": views["latents"]}
    tensors["prompts"] = ids.repeat(len(views["latents"]) // len(frames), 1)
    if model == "text":
        unet, recipe = models.build_text_unet(profile), profile.text
        denoiser, scheduler = models.TextGuided(unet), models.build_scheduler(recipe.prediction)
        parts += [("unet", unet), ("scheduler", scheduler)]
    else:
        frozen = checkpoints.load_generator(needs["text"])
        unet, scheduler = frozen.denoiser.unet, frozen.scheduler
        controlnet = models.build_controlnet(unet)
        denoiser = models.TextSegmentationGuided(unet, controlnet)
        recipe = replace(profile.text_seg, prediction=scheduler.config.prediction_type)
        tensors["masks"] = views["masks"]
        parts.append(("controlnet", controlnet))
    objective = _diffusion(denoiser, scheduler, recipe, settings, states)
    yield Stage(model, objective, tensors, recipe)


def _diffusion(denoiser, scheduler, recipe, settings, states=None):
    settings = {"snr_gamma": recipe.snr_gamma} | settings
    return objectives.DiffusionObjective(denoiser, scheduler, states, **settings)


def _shrunk(frames, side):
    """The frames at another side, for models that diffuse pixels."""
    images = F.interpolate(frames.images, (side, side), mode="bilinear", antialias=True)
    masks = F.interpolate(frames.masks[:, None], (side, side), mode="nearest-exact")[:, 0]
    return data.Frames(images, masks, frames.table)


def _check_latents(vae, folder, frames, profile):
    channels = vae.config.latent_channels
    side = frames.images.shape[-1] // 2 ** (len(vae.config.block_out_channels) - 1)
    expected = (profile.latent_channels, profile.side // models.autoencoder_factor(profile))
    if (channels, side) != expected:
        raise DiffEchoError(
            f"{folder}: gives {channels} channels of side {side}, while profile {profile.name} "
            f"expects {expected[0]} of side {expected[1]}; train an autoencoder with this profile, "
            "or choose that one's"
        )


def steps_within(minutes, stage, probe=30):
    """Steps of a `Stage` that take so many minutes here: 9 tenths of what a copy's `probe` steps tell."""
    copied, seconds = copy.deepcopy(stage.objective), []
    for steps in (5, probe):  # the first steps are slow and do not count
        started = time.monotonic()
        brief = replace(stage.recipe, steps=steps, warmup=1)
        fit(copied, stage.tensors, brief, None, progress=lambda _: None)
        seconds.append(time.monotonic() - started)
    return max(1, int(0.9 * (60 * minutes - sum(seconds)) / (seconds[1] / probe)))


def fit(
    objective,
    tensors,
    recipe,
    state,
    *,
    restart=False,
    seed=0,
    progress=print,
    watch=None,
    made_from=None,
):
    """Train `objective` for `recipe.steps` steps; its network ends with the averaged (EMA) weights.

    objective: module with `network`, `draw(batch, generator)` -> dict of random tensors, and
    `forward(**batch, **drawn)` -> (loss, its parts); tensors: dict of equally long tensors, indexed
    by the batch; state: file (safetensors) of the resumable state, or None to keep none; a run that
    left one there goes on from it, unless `restart`. A process sees `recipe.batch` rows a step, all
    processes together one epoch after the other in an order that `seed` fixes. `progress` is given a
    line of text now and then. watch: (steps, look); after each of those steps `look(step)` finds the
    averaged weights in the network. made_from: further names and values that the state's run must
    share. The caller's random numbers stay as they are.

    Returns a DataFrame: step, loss and its parts, gradient_norm (before clipping), learning_rate,
    images_per_second, seconds. Raises DiffEchoError for a loss or a gradient that is not finite (the last
    good state stays), for a state of another run, and for want of memory.
    """
    models.processes()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # the recipe says it, and not the environment
        gradient_accumulation_steps=recipe.accumulation,
    )
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=recipe.learning_rate,
        betas=(recipe.beta1, 0.999),
        weight_decay=recipe.weight_decay,
    )
    averaged = [p for p in objective.network.parameters() if p.requires_grad]
    ema = EMAModel(averaged, decay=recipe.ema, foreach=True)
    identity = {"recipe": asdict(recipe), "processes": accelerator.num_processes, "seed": seed}
    identity |= made_from or {}
    step, rows = 0, []
    if state is not None and not restart and Path(state).exists():
        step, rows = _load_state(state, objective, optimizer, ema, identity)
        progress(f"resumed at step {step} of {recipe.steps}")
    saved = step
    objective.to(memory_format=torch.channels_last)  # convolutions are faster in it
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    ema.to(accelerator.device)
    tensors = {name: tensor.to(accelerator.device) for name, tensor in tensors.items()}
    objective.train()
    update = _updating(accelerator, wrapped, optimizer, trained, recipe)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    totals, since, told = {}, step, time.monotonic()
    with _stops(recipe, state, accelerator, progress, lambda: (step, saved)), _fork(accelerator):
        while step < recipe.steps:
            rate = learning_rate(step, recipe)
            torch.manual_seed(_dropout_seed(seed, step, accelerator.process_index))
            batches = _micro_batches(objective, tensors, recipe, step, seed, accelerator)
            for name, value in update(batches, rate).items():
                totals[name] = totals.get(name, 0) + value
            step += 1
            ema.step(averaged)
            if watch is not None and step in watch[0]:
                paused = time.monotonic()
                before = copy.deepcopy(objective.network.state_dict())
                _take_averages(objective, ema, averaged, tensors, recipe, seed, accelerator)
                watch[1](step)
                objective.network.load_state_dict(before)
                objective.train()
                told += time.monotonic() - paused
            due = step == recipe.steps or step % recipe.save_every == 0
            if due or (step - since) * 20 >= recipe.steps:
                row = _row(totals, since, step, time.monotonic() - told, rate, recipe, accelerator)
                _check_finite(row, since, recipe, state)
                rows.append(row)
                if accelerator.is_main_process:
                    progress(_line(row, since, recipe))
                totals, since, told = {}, step, time.monotonic()
            if due and state is not None:
                if accelerator.is_main_process:
                    _save_state(state, objective, optimizer, ema, identity, step, rows)
                saved = step
        _take_averages(objective, ema, averaged, tensors, recipe, seed, accelerator)
    objective.to(memory_format=torch.contiguous_format)
    accelerator.wait_for_everyone()
    return pd.DataFrame(rows)


def _updating(accelerator, wrapped, optimizer, trained, recipe):
    """A function of (pieces of a batch, learning rate) that takes one step of the optimiser.

    It returns the means of the loss, of its parts and the gradient's norm, as tensors.
    """
    half = recipe.bf16 and accelerator.device.type == "cuda"
    half = half and torch.cuda.is_bf16_supported(including_emulation=False)  # not on a T4

    def update(batches, rate):
        for group in optimizer.param_groups:
            group["lr"] = rate
        means = {}
        for batch in batches:
            with accelerator.accumulate(wrapped):
                with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=half):
                    loss, parts = wrapped(**batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(trained, recipe.clip)
                optimizer.step()
                optimizer.zero_grad()
            for name, value in {"loss": loss, **parts}.items():
                means[name] = means.get(name, 0) + value.detach() / recipe.accumulation
        return means | {"gradient_norm": norm}

    return update


def _row(totals, since, step, seconds, rate, recipe, accelerator):
    """A row of the log: means since the last one, and how fast it went."""
    seen = (step - since) * recipe.batch * recipe.accumulation * accelerator.num_processes
    means = {name: float(total) / (step - since) for name, total in totals.items()}
    speed = {"images_per_second": seen / seconds, "seconds": seconds}
    return {"step": step} | means | {"learning_rate": rate} | speed


def _check_finite(row, since, recipe, state):
    """Raise DiffEchoError for a loss or a gradient that is not finite, before anything is saved."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(row[name]):
            raise DiffEchoError(
                f"the {name.replace('_', ' ')} is {row[name]} between steps {since + 1} and "
                f"{row['step']}; {state or 'no state'} keeps the last good state: lower the learning "
                f"rate ({recipe.learning_rate:g}) and begin again"
            )


def _line(row, since, recipe):
    left = (recipe.steps - row["step"]) * row["seconds"] / (row["step"] - since)
    return (
        f"step {row['step']:>5}/{recipe.steps}  loss {row['loss']:.4f}  "
        f"{row['images_per_second']:.0f} images/s  {left / 60:.1f} min left"
    )


@contextmanager
def _stops(recipe, state, accelerator, progress, where):
    """Say in words what an interruption leaves, and what to do where memory ends.

    where: returns (the steps done, those of the last save).
    """
    try:
        yield
    except RuntimeError as error:
        # A GPU's OutOfMemoryError is one, a CPU's has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        raise DiffEchoError(
            f"out of memory in step {where()[0] + 1} with {recipe.batch} images at once on "
            f"{accelerator.device}; halve the batch (--batch) and double the recipe's accumulation, or "
            f"take a smaller profile; {state or 'no state'} keeps the last good state"
        ) from error
    except KeyboardInterrupt:
        step, saved = where()
        kept = f"{state} keeps step {saved}; the same command goes on from there"
        if state is not None:
            progress(
                f"interrupted at step {step}; {kept if saved else 'nothing was saved before it'}"
            )
        raise


@contextmanager
def _fork(accelerator):
    """The caller's random numbers as they were, afterwards."""
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


class _Told(nn.Module):
    """An objective that takes its batch as one dict, as torch's `update_bn` hands it on."""

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, batch):
        return self.objective(**batch)


def _take_averages(objective, ema, averaged, tensors, recipe, seed, accelerator, batches=16):
    """Give the network its averaged weights, in evaluation mode.

    Batch normalisation's statistics belong to the weights they were taken with: for the averaged ones
    they are taken anew, over `batches` batches of the training tensors.
    """
    ema.copy_to(averaged)
    chosen = itertools.chain.from_iterable(
        _micro_batches(objective, tensors, recipe, step, seed, accelerator)
        for step in range(-(-batches // recipe.accumulation))
    )
    update_bn(chosen, _Told(objective))  # takes none where the network has no such layer
    objective.network.eval()


def learning_rate(step, recipe):
    """Linear warm-up to the recipe's rate, then constant or half a cosine down to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _micro_batches(objective, tensors, recipe, step, seed, accelerator):
    """This process's share of the step's global batch, in `accumulation` pieces."""
    pieces = recipe.accumulation * accelerator.num_processes
    size = recipe.batch * pieces
    n = len(next(iter(tensors.values())))
    first, last = step * size // n, ((step + 1) * size - 1) // n
    orders = [torch.randperm(n, generator=_generator(seed, 1, e)) for e in range(first, last + 1)]
    rows = torch.cat(orders)[step * size - first * n :][:size]
    batch = {name: tensor[rows.to(tensor.device)] for name, tensor in tensors.items()}
    drawn = objective.draw(batch, _generator(seed, 0, step))
    batch |= {name: tensor.to(accelerator.device) for name, tensor in drawn.items()}
    own = accelerator.process_index * recipe.accumulation
    for piece in range(own, own + recipe.accumulation):
        part = slice(piece * recipe.batch, (piece + 1) * recipe.batch)
        yield {name: tensor[part] for name, tensor in batch.items()}


def _generator(seed, stream, index):
    """Independent random numbers for each (seed, stream, index), the same on every device."""
    return torch.Generator().manual_seed(_seed(seed, stream, index))


def _seed(seed, stream, index):
    return (seed * 2 + stream) * 1_000_003 + index


def _dropout_seed(seed, step, process):
    """Of what a network draws itself: another one than those above, and each process its own."""
    return 2**40 * (1 + process) + _seed(seed, 0, step)


def _save_state(path, objective, optimizer, ema, identity, step, rows):
    """Write weights, optimiser and averages, and in the header the rest, as one file, whole or not."""
    tensors = {f"objective.{k}": v for k, v in objective.state_dict().items()}
    tensors |= {f"ema.{i}": v for i, v in enumerate(ema.shadow_params)}
    for i, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = {"step": step, "made_from": identity, "ema_steps": ema.optimization_step, "log": rows}
    files.save_tensors(path, tensors, {"facts": json.dumps(facts)})


def _known(path):
    """What the header of the state at `path` says the run was made from; None where there is no state."""
    return _read_state(path)[0]["made_from"] if Path(path).exists() else None


def _read_state(path, with_tensors=False):
    """(facts, tensors) of a state; DiffEchoError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return facts, {k: file.get_tensor(k) for k in file.keys()} if with_tensors else {}
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise DiffEchoError(
            f"{path}: damaged ({error}); begin again with --restart (restart=True)"
        ) from None


def _load_state(path, objective, optimizer, ema, identity):
    """Undo `_save_state`; returns (step, log rows). DiffEchoError for the state of another run."""
    facts, tensors = _read_state(path, with_tensors=True)
    _check_same_run(path, facts["made_from"], json.loads(json.dumps(identity)))
    parts = {"objective": {}, "ema": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, key = name.split(".", 1)
        parts[part][key] = tensor
    try:
        objective.load_state_dict(parts["objective"])
    except RuntimeError as error:
        raise DiffEchoError(
            f"{path}: of another architecture ({error}); name another folder, or begin again with "
            "--restart"
        ) from None
    ema.shadow_params = [parts["ema"][str(i)] for i in range(len(ema.shadow_params))]
    ema.optimization_step = facts["ema_steps"]
    saved = optimizer.state_dict()
    saved["state"] = {}
    for key, tensor in parts["optimizer"].items():
        index, name = key.split(".", 1)
        saved["state"].setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(saved)
    return facts["step"], facts["log"]


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


def _training(model, frames, profile, recipes, log, provenance, seed):
    """What training.json says: data, recipes, time, the loss curve of each stage, provenance."""
    table = frames.table
    curves = {
        stage: rows.drop(columns="stage").dropna(axis="columns").round(5).to_dict("records")
        for stage, rows in log.groupby("stage", sort=False)
    }
    return {
        "model": model,
        "world": table.attrs.get("world"),
        "profile": profile.name,
        "splits": _splits(table),
        "patients": int(table["patient"].nunique()),
        "frames": len(frames),
        "side": frames.side,
        "stretched": frames.stretched,
        "seed": seed,
        "processes": models.processes().num_processes,
        "recipes": {name: asdict(recipe) for name, recipe in recipes.items()},
        "minutes": round(log["seconds"].sum() / 60, 1),
        "peak_memory_gib": _peak_memory(),
        "log": curves,
    } | (provenance or {})


def _splits(table):
    return sorted(table["split"].dropna().unique())


def _peak_memory():
    """GiB of the GPU that the last training has held at most; None without one."""
    return (
        round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None
    )
