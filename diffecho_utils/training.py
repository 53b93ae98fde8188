"""The one training loop, and what it minimises for each network.

Chapters 02 and 03. `fit` knows nothing of images: an objective (a module whose forward returns the
loss) brings the network, and all randomness is a function of (seed, step). So a run that was
interrupted ends with the very weights of one that was not, and two processes train what one
process with twice the batch does.

    python -m diffecho_utils train autoencoder --data ROOT --profile cpu --out DIR [--resume]
    accelerate launch -m diffecho_utils train unconditional --data ROOT --autoencoder DIR --out DIR
"""

import dataclasses
import json
import math
import os
import shutil
import time
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from diffusers.training_utils import EMAModel
from monai.losses import JukeboxLoss
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from diffecho_utils import DiffEchoError, data, models

# Small movements only: how bright the samples are is one of the paper's claims, so gain stays as it is.
UNCONDITIONAL_JITTER = {"degrees": 4.0, "shift": 0.02, "zoom": 0.04, "gain": 0.0, "contrast": 0.0}


class ReconstructionObjective(nn.Module):
    """First stage of the autoencoder: L1, amplitude spectrum (MONAI's JukeboxLoss) and a whiff of KL.

    Trains on random crops; `data` is {"images": (N, 1, H, W) in [-1, 1]}.
    """

    def __init__(self, vae, crop, spectral=1.0, kl=1e-6):
        super().__init__()
        self.network, self.crop = vae, crop
        self.spectral, self.kl = spectral, kl
        self.spectrum = JukeboxLoss(spatial_dims=2, fft_norm="ortho")

    def draw(self, batch, generator):
        """Random numbers for a batch: crop corners, and the noise of the posterior sample."""
        return _draw_crops(batch, self.crop, generator) | {
            "noise": torch.randn(len(batch["images"]), *self._latent_shape(), generator=generator)
        }

    def forward(self, images, corners, noise):
        crops = _crop(images, corners, self.crop)
        posterior = self.network.encode(crops).latent_dist
        reconstruction = self.network.decode(posterior.mean + posterior.std * noise).sample
        parts = {
            "l1": F.l1_loss(reconstruction, crops),
            "spectral": self.spectral * self.spectrum(reconstruction, crops),
            "kl": self.kl * posterior.kl().mean(),
        }
        return sum(parts.values()), parts

    def _latent_shape(self):
        config = self.network.config
        side = self.crop // 2 ** (len(config.block_out_channels) - 1)
        return (config.latent_channels, side, side)


class TextureObjective(nn.Module):
    """Second stage: the decoder alone, against a patch discriminator that knows real speckle.

    Speckle is noise to a pixel loss, whose best guess is its mean: blur. Here L1 acts mostly at a
    quarter of the resolution, the standard deviation of the high frequencies must match, and the
    discriminator (hinge loss) judges the rest. It is shown the high frequencies, amplified, beside
    the picture: without them it does not learn to tell real from reconstructed.
    """

    def __init__(self, vae, discriminator, crop, adversarial=0.03, fine=0.2, deviation=1.0):
        super().__init__()
        self.network, self.discriminator, self.crop = vae, discriminator, crop
        self.adversarial, self.fine, self.deviation = adversarial, fine, deviation
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)

    def draw(self, batch, generator):
        """Random numbers for a batch: crop corners."""
        return _draw_crops(batch, self.crop, generator)

    def forward(self, images, corners):
        crops = _crop(images, corners, self.crop)
        with torch.no_grad():
            latents = self.network.encode(crops).latent_dist.mean
        reconstruction = self.network.decode(latents).sample
        self.discriminator.requires_grad_(False)
        fooled = -self._judge(reconstruction).mean()
        self.discriminator.requires_grad_(True)
        caught = F.relu(1 + self._judge(reconstruction.detach())).mean()
        believed = F.relu(1 - self._judge(crops)).mean()
        quarter = (F.avg_pool2d(x, 4) for x in (reconstruction, crops))
        deviations = (_high_frequencies(x).std(dim=(1, 2, 3)) for x in (reconstruction, crops))
        parts = {
            "l1_quarter": F.l1_loss(*quarter),
            "l1": self.fine * F.l1_loss(reconstruction, crops),
            "deviation": self.deviation * F.l1_loss(*deviations),
            "adversarial": self.adversarial * fooled,
            "discriminator": (caught + believed) / 2,
        }
        return sum(parts.values()), parts

    def _judge(self, images):
        return self.discriminator(torch.cat([images, 10 * _high_frequencies(images)], dim=1))


class DiffusionObjective(nn.Module):
    """Mean squared error of the denoiser's prediction (noise or v, as the scheduler says).

    `data` is {"latents": (N, C, h, w), "class_labels": (N,)}; timesteps are uniform.
    """

    def __init__(self, unet, scheduler):
        super().__init__()
        self.network, self.scheduler = unet, scheduler

    def draw(self, batch, generator):
        """Random numbers for a batch: noise and timesteps."""
        shape, steps = batch["latents"].shape, self.scheduler.config.num_train_timesteps
        return {
            "noise": torch.randn(shape, generator=generator),
            "timesteps": torch.randint(steps, shape[:1], generator=generator),
        }

    def forward(self, latents, class_labels, noise, timesteps):
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = noise
        prediction = self.network(noisy, timesteps, class_labels=class_labels).sample
        return F.mse_loss(prediction, target), {}


def train_autoencoder(
    frames, profile, folder, *, resume=False, provenance=None, progress=print, seed=0
):
    """Train the autoencoder on `frames` (data.Frames) in two stages and save it in `folder`.

    Returns the log, a DataFrame with a row every few steps. The scaling factor in the saved
    configuration makes the training latents' standard deviation 1.
    """
    folder = Path(folder)
    torch.manual_seed(seed)
    vae, discriminator = models.build_autoencoder(profile), models.build_discriminator()
    tensors = {"images": frames.images}

    def stage(name, objective, recipe):
        state = folder / "state" / name
        log = fit(objective, tensors, recipe, state, resume=resume, progress=progress, seed=seed)
        return log.assign(stage=name)

    logs = [
        stage("reconstruction", ReconstructionObjective(vae, profile.crop), profile.autoencoder),
        stage("texture", TextureObjective(vae, discriminator, profile.crop), profile.texture),
    ]
    deviation = data.encode(vae.cpu(), frames.images[:: max(1, len(frames) // 400)]).std().item()
    vae.register_to_config(scaling_factor=1 / deviation)
    log = pd.concat(logs, ignore_index=True)
    recipes = {"reconstruction": profile.autoencoder, "texture": profile.texture}
    training = _training("autoencoder", frames, profile, recipes, log, provenance, seed)
    if PartialState().is_main_process:
        models.save_autoencoder(vae, folder, training)
    return log


def train_unconditional(
    frames,
    autoencoder,
    profile,
    folder,
    *,
    resume=False,
    provenance=None,
    progress=print,
    seed=0,
    cache_dir=None,
):
    """Train the unconditional generator on the frames' latents and save it in `folder`.

    `autoencoder` is a checkpoint's folder. Returns the log as `train_autoencoder` does.
    """
    vae = models.load_autoencoder(autoencoder)
    torch.manual_seed(seed)
    unet = models.build_unet(profile)
    expected = (
        vae.config.latent_channels,
        frames.images.shape[-1] // 2 ** (len(vae.config.block_out_channels) - 1),
    )
    if expected != (unet.config.in_channels, unet.config.sample_size):
        raise DiffEchoError(
            f"{autoencoder}: gives {expected[0]} channels of side {expected[1]}, while profile "
            f"{profile.name} expects {unet.config.in_channels} of side {unet.config.sample_size}; "
            "train an autoencoder with this profile, or choose that one's"
        )
    tensors = data.latent_views(
        vae, frames, profile.jittered_views, seed, cache_dir, **UNCONDITIONAL_JITTER
    )
    objective = DiffusionObjective(unet, models.build_scheduler())
    state = Path(folder) / "state"
    log = fit(
        objective,
        tensors,
        profile.unconditional,
        state,
        resume=resume,
        progress=progress,
        seed=seed,
    )
    log = log.assign(stage="unconditional")
    recipes = {"unconditional": profile.unconditional}
    training = _training("unconditional", frames, profile, recipes, log, provenance, seed)
    if PartialState().is_main_process:
        models.save_unconditional(unet.cpu(), folder, autoencoder, training)
    return log


def fit(
    objective, tensors, recipe, state, *, resume=False, seed=0, progress=print, stop_after=None
):
    """Train `objective` for `recipe.steps` steps; its network ends with the averaged (EMA) weights.

    objective: module with `network`, `draw(batch, generator)` -> dict of random tensors, and
    `forward(**batch, **drawn)` -> (loss, its parts); tensors: dict of equally long tensors, indexed
    by the batch; state: folder of the resumable state, or None to keep none. A process sees
    `recipe.batch` rows a step, all processes together one epoch after the other in an order that
    `seed` fixes. `progress` is given a line of text now and then. `stop_after` ends early after that
    step as an interruption would. Returns a DataFrame: step, loss and its parts, learning_rate,
    images_per_second, seconds. Raises DiffEchoError for a loss that is not finite; the last good state stays.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=recipe.accumulation,
        mixed_precision="bf16"
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        else "no",
    )
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    ema = EMAModel([p for p in objective.network.parameters() if p.requires_grad], decay=recipe.ema)
    step, rows = 0, []
    if resume and state is not None and (Path(state) / "state.json").exists():
        step, rows = _load_state(state, objective, optimizer, ema, recipe)
        progress(f"resumed at step {step} of {recipe.steps}")
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    ema.to(accelerator.device)
    tensors = {name: tensor.to(accelerator.device) for name, tensor in tensors.items()}
    objective.train()

    def save():
        if state is not None and accelerator.is_main_process:
            _save_state(state, objective, optimizer, ema, recipe, step, rows)

    totals, since, told = {}, step, time.monotonic()
    end = recipe.steps if stop_after is None else min(stop_after, recipe.steps)
    try:
        while step < end:
            rate = learning_rate(step, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for micro in _micro_batches(objective, tensors, recipe, step, seed, accelerator):
                with accelerator.accumulate(wrapped), accelerator.autocast():
                    loss, parts = wrapped(**micro)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(trained, recipe.clip)
                    optimizer.step()
                    optimizer.zero_grad()
                for name, value in {"loss": loss, **parts}.items():
                    totals[name] = totals.get(name, 0) + value.detach() / recipe.accumulation
            step += 1
            ema.step([p for p in objective.network.parameters() if p.requires_grad])
            now = time.monotonic()
            if step == end or step % recipe.save_every == 0 or (step - since) * 20 >= recipe.steps:
                means = {name: float(total) / (step - since) for name, total in totals.items()}
                if not math.isfinite(means["loss"]):
                    raise DiffEchoError(
                        f"the loss is {means['loss']} between steps {since + 1} and {step}; "
                        f"{state or 'no state'} keeps the last good state: lower the learning rate "
                        f"({recipe.learning_rate:g}) and resume"
                    )
                seen = (
                    (step - since) * recipe.batch * recipe.accumulation * accelerator.num_processes
                )
                speed = seen / (now - told)
                rows.append({"step": step} | means)
                rows[-1] |= {
                    "learning_rate": rate,
                    "images_per_second": speed,
                    "seconds": now - told,
                }
                if accelerator.is_main_process:
                    left = (recipe.steps - step) * (now - told) / (step - since)
                    progress(
                        f"step {step:>5}/{recipe.steps}  loss {means['loss']:.4f}  "
                        f"{speed:.0f} images/s  {left / 60:.1f} min left"
                    )
                totals, since, told = {}, step, now
                if step % recipe.save_every == 0 or step == end:
                    save()
    except KeyboardInterrupt:
        if state is not None:
            progress(
                f"interrupted at step {step}; resume from the state of the last save in {state}"
            )
        raise
    if step == recipe.steps:
        ema.copy_to([p for p in objective.network.parameters() if p.requires_grad])
        objective.network.eval()
    accelerator.wait_for_everyone()
    return pd.DataFrame(rows)


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
    positions = torch.arange(step * size, (step + 1) * size)
    epochs = {int(e): _generator(seed, 1, int(e)) for e in (positions // n).unique()}
    orders = {epoch: torch.randperm(n, generator=generator) for epoch, generator in epochs.items()}
    rows = torch.stack([orders[int(p // n)][p % n] for p in positions])
    batch = {name: tensor[rows.to(tensor.device)] for name, tensor in tensors.items()}
    drawn = objective.draw(batch, _generator(seed, 0, step))
    batch |= {name: tensor.to(accelerator.device) for name, tensor in drawn.items()}
    first = accelerator.process_index * recipe.accumulation
    for piece in range(first, first + recipe.accumulation):
        part = slice(piece * recipe.batch, (piece + 1) * recipe.batch)
        yield {name: tensor[part] for name, tensor in batch.items()}


def _generator(seed, stream, index):
    """Independent random numbers for each (seed, stream, index), the same on every device."""
    return torch.Generator().manual_seed((seed * 2 + stream) * 1_000_003 + index)


def _draw_crops(batch, crop, generator):
    n, _, height, width = batch["images"].shape
    rows = torch.randint(height - crop + 1, (n,), generator=generator)
    columns = torch.randint(width - crop + 1, (n,), generator=generator)
    return {"corners": torch.stack([rows, columns], 1)}


def _crop(images, corners, crop):
    pairs = zip(images, corners.tolist(), strict=True)
    return torch.stack([image[:, r : r + crop, c : c + crop] for image, (r, c) in pairs])


def _high_frequencies(images):
    """Image minus its blur (5 x 5 mean): what is finer than about five pixels."""
    return images - F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), 5, stride=1)


def _save_state(state, objective, optimizer, ema, recipe, step, rows):
    """Write weights, optimiser, averages (safetensors) and the rest (JSON) beside, then swap them in."""
    tensors = {f"objective.{k}": v for k, v in objective.state_dict().items()}
    tensors |= {f"ema.{i}": v for i, v in enumerate(ema.shadow_params)}
    for i, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    state = Path(state)
    beside, old = state.with_name(f".{state.name}.new"), state.with_name(f".{state.name}.old")
    for folder in (beside, old):
        shutil.rmtree(folder, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file(tensors, beside / "state.safetensors")
    facts = {
        "step": step,
        "recipe": dataclasses.asdict(recipe),
        "ema_steps": ema.optimization_step,
        "log": rows,
    }
    (beside / "state.json").write_text(json.dumps(facts))
    if state.exists():
        os.replace(state, old)
    os.replace(beside, state)
    shutil.rmtree(old, ignore_errors=True)


def _load_state(state, objective, optimizer, ema, recipe):
    """Undo `_save_state`; returns (step, log rows)."""
    state = Path(state)
    try:
        facts = json.loads((state / "state.json").read_text())
        tensors = load_file(state / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise DiffEchoError(
            f"{state}: half-written or damaged ({error}); delete it to start over"
        ) from None
    if facts["recipe"] != dataclasses.asdict(recipe):
        changed = [k for k, v in dataclasses.asdict(recipe).items() if facts["recipe"].get(k) != v]
        raise DiffEchoError(
            f"{state}: was trained with another {changed}; use that, or start without --resume"
        )
    parts = {"objective": {}, "ema": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, key = name.split(".", 1)
        parts[part][key] = tensor
    try:
        objective.load_state_dict(parts["objective"])
    except RuntimeError as error:
        raise DiffEchoError(
            f"{state}: of another architecture ({error}); start without --resume"
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
        "splits": sorted(table["split"].dropna().unique()),
        "patients": int(table["patient"].nunique()),
        "frames": len(frames),
        "seed": seed,
        "recipes": {name: dataclasses.asdict(recipe) for name, recipe in recipes.items()},
        "minutes": round(log["seconds"].sum() / 60, 1),
        "log": curves,
    } | (provenance or {})
