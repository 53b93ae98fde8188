"""What the cells of every chapter call: the data to work on, a network of one's own, answers and numbers."""

import contextlib
import hashlib
from dataclasses import replace

import pandas as pd
import torch

from diffecho_utils import (
    assets,
    camus,
    checkpoints,
    data,
    phantom,
    profiles,
    releases,
    results,
    training,
)


def begin(name, data_root):
    """What a chapter works on: (profile, table of frames); prints which they are. Tables cut no sentence short.

    name: of a profile; empty: "gpu" where PyTorch finds one, else "cpu". data_root: CAMUS in any form
    that `releases` knows; empty: the profile's phantom, written where it is missing.
    """
    pd.set_option("display.max_colwidth", None)
    profile = profiles.get(name or ("gpu" if torch.cuda.is_available() else "cpu"))
    table = camus.read_table(releases.official(data_root or phantom_folder(profile)))
    world, patients = table.attrs["world"], table.patient.nunique()
    print(
        f"profile {profile.name}, {profile.side} px{'' if name else ' (chosen for this machine)'}\n"
        f"data: {world}, {patients} patients\nmachine: {results.hardware()}"
    )
    return profile, table


def phantom_folder(profile):
    """The profile's phantom, written where it is missing: its folder."""
    folder = assets.workspace() / f"phantom-{profile.name}"
    return phantom.ensure(folder, patients=profile.phantom_patients, seed=profile.phantom_seed)


def from_scratch(model, table, profile, say=print):
    """Train `model` by the profile's whole recipe on `table`'s training patients: its folder.

    What a chapter does with `train_from_scratch = True`. It stands on the shipped checkpoints that it
    builds on, and takes its size of images and latents from them. Kept in the workspace, one folder
    for each set of patients: interrupted, it goes on when called again; done, it is only named.
    """
    rows = camus.select(table, "training", patients=profile.patients)
    kept, cache = assets.workspace() / "trained", assets.workspace() / "cache"
    patients = hashlib.sha256("\n".join([table.attrs["root"], *rows["patient"]]).encode())
    folder = kept / f"{table.attrs['world']}-{profile.name}-{patients.hexdigest()[:8]}" / model
    if (folder / "training.json").exists():
        return folder
    needs = {name: assets.checkpoint("camus", name) for name in training.builds_on(model, profile)}
    if needs:  # the sizes of what the shipped networks learned from
        like = checkpoints.load_generator(assets.checkpoint("camus", model))
        channels, *_ = like.latent_shape
        width = like.text.model.config.hidden_size if like.text else profile.clip_width
        sizes = {"latent_channels": channels, "clip_width": width}
        profile = replace(profile, side=like.side, stretched=like.stretched, **sizes)
    training.train(
        model,
        data.load_frames(rows, profile, cache_dir=cache),
        profile,
        folder,
        needs=needs,
        provenance=results.provenance(f"from_scratch({model!r}), profile {profile.name}"),
        say=say,
        cache_dir=cache,
    )
    return folder


def live(table, profile):
    """One line for the caption of what this run computes: "Live: phantom, 60 patients, profile cpu"."""
    return (
        f"Live: {table.attrs['world']}, {table.patient.nunique()} patients, profile {profile.name}"
    )


def save(results_dir, name, values, table, profile, seeds=(), split="validation"):
    """Record what a chapter measured (`results.save`) in `results_dir`; where that is empty, in the workspace.

    The command in the record makes it again; it holds no path of this machine.
    """
    world = table.attrs["world"]
    root = "DATA=/path/to/camus " if world == "camus" else ""
    results.save(
        results_dir or assets.workspace() / "results",
        name,
        values,
        world=world,
        profile=profile.name,
        command=f"make book {root}PROFILE={profile.name}",
        seeds=seeds,
        split=split,
    )


@contextlib.contextmanager
def exercise(number, **answers):
    """What a checking cell does its checks in: first that no answer is still the stub's `...`.

    Raises AssertionError that names the empty answers, and says so when the checks inside passed.
    """
    empty = [f"`{name}`" for name, value in answers.items() if value is ...]
    if empty:
        raise AssertionError(f"Exercise {number}: {', '.join(empty)} still to be found")
    yield
    print(f"Exercise {number}: passed.")
