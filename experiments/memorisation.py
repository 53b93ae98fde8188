"""Do the shipped generators copy training frames, and would this experiment see it if they did?

Looked at are latents at half their side, where a copy is found whose grain differs. An image is a suspect
where its distance to the nearest training frame, over the mean of the next fifty, is below what one
held-out frame in a hundred has. Drawn are the validation patients' classes, prompts and label maps, and
the training patients' maps, where copying is most likely. What must be found: training frames under noise,
training frames noised to a timestep and denoised by the generator, and what an SDM draws that learned few
frames by heart. A membership test asks whether the denoising loss tells training from validation frames.
Record: memorisation (chapters 06 and 08). Half an hour on one core, most of it drawing.
"""

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from world import QUIET, draw, kept, patients, thinned

from diffecho_utils import camus, data, intervals, metrics, models, objectives, sampling, training

USES = ("autoencoder",)
SEEDS, SPLIT = (
    (1000, 2000, 3000),
    "validation",
)  # of the first image of each run, as in `generators`
SHARE = 0.01  # of held-out frames, below the threshold
STARTS = (100, 300, 500, 700, 900)
CONTROL = 300  # of these the one that must be found
TIMES = (100, 300, 500)  # of the membership test
NOISE = (0.05, 0.1, 0.2)  # on frames in [-1, 1]
LEARNED = 8  # patients that the SDM learns by heart


def rows(world, runs=3):
    named = {"real": {"kind": "real"}}
    for start in sorted(STARTS, key=lambda start: start != CONTROL):
        begun = {"kind": "begun", "start": start}
        named |= {f"{model}: from {start}": begun | {"model": model} for model in models.GENERATORS}
        if start == CONTROL:
            named |= others(SEEDS[:runs])
    return named


def others(seeds):
    """The rows that look for copies, most telling first."""
    named = {}
    for seed in seeds:
        drawn = {"kind": "drawn", "seed": seed}
        named |= {f"{model}: {seed}": drawn | {"model": model} for model in models.GENERATORS}
    for model in models.GENERATORS:
        if "masks" in sampling.CONDITIONS[model]:
            named[f"{model}: training maps"] = {"kind": "to_training_maps", "model": model}
        named[f"{model}: membership"] = {"kind": "membership", "model": model}
    return named | {"learned by heart": {"kind": "by_heart", "model": "sdm"}}


def compute(world, kind, **settings):
    return globals()[kind](world, **settings)


def real(world):
    """Held-out frames, training frames beside those of other patients, and copies under noise."""
    known = world.frames("training")
    low, owners = of_split(world, "training"), patients(known)
    found = {"held out": closeness(world, of_split(world, "validation"))}
    away, ratio, index = metrics.copied(low, low, neighbours(world), (owners, owners))
    found["other patients"] = {"distance": away, "ratio": ratio, "nearest": owners[index]}
    found["owners"] = owners
    some = known.where(spread(known, 200))
    for amount in NOISE:
        noise = torch.randn(some.images.shape, generator=torch.Generator().manual_seed(SEEDS[0]))
        noisy = (some.images + amount * noise).clamp(-1, 1)
        found[f"noise {amount}"] = closeness(world, see(world, noisy))
    return found


def drawn(world, model, seed):
    return closeness(world, see(world, world.drawn(model, "validation", seed)))


def begun(world, model, start):
    """Training frames noised to a timestep and denoised, told what belongs to them."""
    generator, frames = world.generator(model), world.frames("training")
    some = spread(frames, 24)
    mine, seeds = frames.where(some), SEEDS[0] + np.flatnonzero(some)
    steps = world.profile.sampling_steps
    images = draw(generator, mine, seeds, steps, start=(mine.images, start))
    return closeness(world, see(world, images), np.flatnonzero(some))


def to_training_maps(world, model):
    """Suspects, and whether an image resembles the frame of its map more than of an unseen map."""
    known, unseen = world.frames("training"), world.frames("validation")
    some = spread(known, 100)
    mine, seeds = known.where(some), SEEDS[0] + np.flatnonzero(some)
    low = see(world, draw(world.generator(model), mine, seeds, world.profile.sampling_steps))
    found = closeness(world, low, np.flatnonzero(some))
    of_unseen = see(world, world.drawn(model, "validation", SEEDS[0]))
    alike = [likeness(world, low, mine, of_split(world, "training")[some])]
    alike += [likeness(world, of_unseen, unseen, of_split(world, "validation"))]
    owners = np.concatenate([patients(mine), patients(unseen)])
    return found | {"likeness": [np.median(x) for x in alike], "told apart": auc(*alike, owners)}


def membership(world, model, generator=None, known=None):
    """AUC by which the denoising loss tells training frames from validation frames, class by class."""
    generator, every = generator or world.generator(model), world.frames("training")
    known = known or every.where(thinned(every, 8))
    sets = known, world.frames("validation")
    owners = np.concatenate([patients(frames) for frames in sets])
    loss = [losses(generator, frames) for frames in sets]
    found = {t: auc(*(x[t] for x in loss), owners) for t in TIMES}
    kinds = np.concatenate([frames.classes.numpy() for frames in sets])
    means = [np.mean(list(x.values()), 0) for x in loss]
    found |= {"all": auc(*means, owners), "by class": auc(*means, owners, kinds)}
    return {"frames": [len(frames) for frames in sets], "auc": found}


def by_heart(world, model):
    """An SDM that goes on learning with few patients alone: what a generator that copies looks like."""
    every = world.frames("training")
    known = every.where(np.isin(patients(every), list(dict.fromkeys(patients(every)))[:LEARNED]))
    shipped, steps = world.generator(model), 8 * world.profile.live_steps
    pupil = replace(shipped, denoiser=copy.deepcopy(shipped.denoiser))
    tensors = data.latent_views(world.vae, known)
    objective = objectives.DiffusionObjective(pupil.denoiser, pupil.scheduler)
    recipe = replace(world.profile.sdm, steps=steps, batch=16, ema=0.99)
    training.fit(objective, tensors, recipe, None, **QUIET)
    pupil.denoiser.eval()
    seeds = SEEDS[0] + np.arange(len(known))
    images = draw(pupil, known, seeds, world.profile.sampling_steps)
    found = closeness(world, see(world, images)) | membership(world, model, pupil, known)
    return found | {"patients": LEARNED, "steps": steps}


def see(world, images):
    """Latents at half their side: (N, D)."""
    latents = data.encode(world.vae, images)
    return metrics.latent_features(latents, latents.shape[-1] // 2)


@kept
def of_split(world, split):
    return see(world, world.frames(split).images)


def closeness(world, low, own=None):
    """Distance and ratio of each image; with `own`, its training frame, whether that is the nearest."""
    away, ratio, index = metrics.copied(low, of_split(world, "training"), neighbours(world))
    found = {"distance": away, "ratio": ratio}
    return found if own is None else found | {"own is nearest": np.mean(index == own)}


def neighbours(world):
    """Fifty, or as many as a small set has."""
    return min(50, len(world.frames("training")) // 2)


def likeness(world, low, frames, own):
    """Distance of images from the frames of their maps over that of the next frames of other patients."""
    known = world.frames("training")
    owners = patients(frames), patients(known)
    away, ratio, _ = metrics.copied(low, of_split(world, "training"), neighbours(world), owners)
    return np.sqrt(((low - own) ** 2).mean(1)) / (away / ratio)


@torch.no_grad()
def losses(generator, frames):
    """{timestep: squared error of the prediction of each frame}, the same noise for every generator."""
    device, scheduler = models.device(), generator.scheduler
    latents = data.encode(generator.vae, frames.images)
    noise = sampling.initial_noise(SEEDS[0] + np.arange(len(frames)), generator.latent_shape)
    told, found = sampling.told(generator.model, frames), {t: [] for t in TIMES}
    for part in np.array_split(np.arange(len(frames)), -(-len(frames) // 50)):
        mine = {name: [values[i] for i in part] for name, values in told.items()}
        if "masks" in mine:
            mine["masks"] = torch.stack(mine["masks"])
        given, _ = sampling.arguments(generator, device, mine)
        for t in TIMES:
            times = torch.full((len(part),), t, device=device)
            x, e = latents[part].to(device), noise[part].to(device)
            answer = generator.denoiser(scheduler.add_noise(x, e, times), times, **given)
            is_v = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(x, e, times) if is_v else e
            found[t].append(F.mse_loss(answer, target, reduction="none").mean((1, 2, 3)).cpu())
    return {t: torch.cat(parts).numpy() for t, parts in found.items()}


def auc(members, others, owners, kinds=None):
    """(AUC, low, high) by which smaller values tell members, over patients; with kinds their mean."""
    score = -np.concatenate([members, others])
    truth = np.arange(len(score)) < len(members)
    kinds = np.zeros(len(score)) if kinds is None else kinds

    def mean(rows):
        parts = [rows[kinds[rows] == kind] for kind in np.unique(kinds)]
        return np.mean([roc_auc_score(truth[r], score[r]) for r in parts])

    return intervals.bootstrap(mean, owners)


def spread(frames, count):
    """Which frames: about so many, of as many patients and of all classes alike."""
    step = len(camus.CLASSES) * (len(frames) // (len(camus.CLASSES) * count)) + 1
    return np.isin(np.arange(len(frames)), np.arange(0, len(frames), step)[:count])


def collect(world, found):
    truth = found["real"]
    limits = {k: np.quantile(truth["held out"][k], SHARE) for k in ("distance", "ratio")}

    def summary(*parts):
        both = {name: np.concatenate([p[name] for p in parts]) for name in limits}
        hits = both["ratio"] < limits["ratio"]
        of = {"n": len(hits), "suspects": int(hits.sum()), "share": intervals.share(hits)}
        of["nearer"] = np.mean(both["distance"] < limits["distance"])
        of |= {name: np.quantile(x, [0, 0.01, 0.05, 0.5]) for name, x in both.items()}
        extra = {name: x for name, x in parts[0].items() if name not in (*limits, "nearest")}
        return of | {"ratios": np.sort(both["ratio"]).round(4)} | extra

    values = {"frames": len(world.frames("training")), "neighbours": neighbours(world)}
    values |= {"share": SHARE, "threshold": limits, "steps": world.profile.sampling_steps}
    values["real"] = {name: summary(of) for name, of in truth.items() if name != "owners"}
    crowd = truth["other patients"]
    near = np.array(crowd["ratio"]) < limits["ratio"]
    pairs = zip(np.array(truth["owners"])[near], np.array(crowd["nearest"])[near], strict=True)
    values["twins"] = [[*pair, n] for pair, n in Counter(map(tuple, map(sorted, pairs))).items()]
    values["twins"] = [pair for pair in values["twins"] if pair[-1] >= len(camus.CLASSES)]
    values["by heart"] = summary(found["learned by heart"])
    for model in models.GENERATORS:
        of = {"drawn": summary(*(found[name] for s in SEEDS if (name := f"{model}: {s}") in found))}
        of["begun"] = {start: summary(found[f"{model}: from {start}"]) for start in STARTS}
        of["membership"] = found[f"{model}: membership"]
        if f"{model}: training maps" in found:
            of["training maps"] = summary(found[f"{model}: training maps"])
        values[model] = of
    return {"memorisation": values}
