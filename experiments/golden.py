"""Golden values: a hash of whatever the package computes, to be compared before and after a change.

    python experiments/golden.py > before.txt      (two minutes on one core)
    (change the package)
    python experiments/golden.py | diff before.txt -

At smoke size, with fixed seeds: the phantom's files, the tensors of its frames, one training of each model, what
each generator draws with each solver, the panel, what judges read, a run of both downstream tasks and their
paired differences. A change that is meant to move code leaves every line as it is, on one machine with one
number of threads; another machine rounds otherwise.
"""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diffecho_utils import (
    camus,
    checkpoints,
    data,
    downstream,
    metrics,
    models,
    phantom,
    profiles,
    prompts,
    runs,
    sampling,
    synthetic,
    training,
)


def main():
    torch.set_num_threads(1)
    profile = profiles.get("smoke")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        root = phantom.write(folder / "phantom", patients=10, seed=7)
        for path in sorted(root.rglob("*")):
            if path.is_file() and "patient0001" in path.name:
                say(f"phantom, {path.name}", path.read_bytes())
        table = camus.read_table(root)
        parts = {name: camus.select(table, name) for name in ("training", "validation")}
        frames = {name: data.load_frames(rows, profile) for name, rows in parts.items()}
        for name, part in frames.items():
            say(
                f"frames, {name}",
                part.images,
                part.masks,
                part.table.drop(columns=["image", "label_map"]),
            )
        say("prompts", data.prompt_table(frames["training"], prompts.TEMPLATES))
        folders = trained(frames["training"], profile, folder)
        sets = {
            name: drawn(name, folders[name], frames["validation"]) for name in models.GENERATORS
        }
        measured(sets, frames, folders)
        downstream_runs(frames, profile)


def trained(frames, profile, folder):
    folders = {model: folder / model for model in training.MODELS}
    for model, needs in training.MODELS.items():
        needed = {name: folders[name] for name in needs}
        log = training.train(model, frames, profile, folders[model], needs=needed, progress=str)
        say(f"training, {model}", checkpoints.weights_digest(folders[model]), log[["step", "loss"]])
    return folders


def drawn(name, folder, frames):
    generator = checkpoints.load_generator(folder)
    seeds, told = np.arange(len(frames)), sampling.told(name, frames)
    guidance = 1.0 if name == "unconditional" else 2.0
    for solver, scheduler in sampling.SOLVERS.items():
        images = sampling.sample(
            generator,
            seeds,
            3,
            guidance=guidance,
            scheduler=scheduler.from_config(generator.scheduler.config),
            **told,
        )
        say(f"drawn, {name}, {solver}", images)
    planned = synthetic.plan(name, 2, frames)
    table = synthetic.write(generator, folder / "set", *planned, 2, seed=3)
    say(f"set, {name}", table, *(p.read_bytes() for p in sorted((folder / "set").rglob("*.png"))))
    return images


def measured(sets, frames, folders):
    vae = checkpoints.load_autoencoder(folders["autoencoder"])
    judges = [checkpoints.load_network(folders[name]) for name in ("segmenter", "classifier")]
    known, unseen = frames["training"], frames["validation"]
    several = data.joined(*[unseen] * 4)  # a panel needs some of each class
    for name, images in sets.items():
        see = [
            metrics.features(vae, x)
            for x in (images.repeat(4, 1, 1, 1), known.images, several.images)
        ]
        classes = [x.classes.numpy() for x in (several, known, several)]
        pairs = [item for pair in zip(see, classes, strict=True) for item in pair]
        say(f"panel, {name}", metrics.panel(*pairs, several.table["patient"].to_numpy()))
        images = images.repeat(4, 1, 1, 1)
        read = downstream.read_by_judges(judges, images, several.classes.numpy(), several.masks)
        say(f"judges, {name}", pd.DataFrame(read))


def downstream_runs(frames, profile):
    known, unseen = frames["training"], frames["validation"]
    for task, train, settings in (
        ("segmentation", downstream.segmentation_run, {}),
        ("segmentation, paper", downstream.segmentation_run, {"recipe": "paper"}),
        ("classification", downstream.classification_run, {"network": "small"}),
    ):
        pair = [train(known, unseen, profile, seed=s, say=str, **settings) for s in (0, 1)]
        for run in pair:
            del run["seconds"]
        say(f"runs, {task}", pair)
        if task == "segmentation":
            say(f"difference, {task}", runs.paired_difference(pair[:1], pair[1:]))
        elif task == "classification":
            say(f"difference, {task}", runs.classification_difference(pair[:1], pair[1:]))


def say(name, *values):
    """Print the name and a hash of the values: bytes, text, tensors, arrays, tables, lists, numbers."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, bytes):
            digest.update(value)
        elif isinstance(value, torch.Tensor):
            digest.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, np.ndarray):
            digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, pd.DataFrame):
            digest.update(value.to_csv(float_format="%.17g").encode())
        else:
            with np.printoptions(threshold=10**9, precision=17):
                digest.update(repr(value).encode())
    print(f"{digest.hexdigest()[:16]}  {name}", flush=True)


if __name__ == "__main__":
    main()
