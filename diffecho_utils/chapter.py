"""What the first cells of a chapter call: the data to work on, a network of one's own, checks of answers."""

import contextlib
import hashlib
from dataclasses import replace

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


def from_scratch(model, table, profile, say=print):
    """Train `model` by the profile's whole recipe on `table`'s training patients: its folder.

    What a chapter does with `train_from_scratch = True`. It stands on the shipped checkpoints that it
    builds on, and takes its size of images and latents from them. Kept in the workspace, one folder
    for each set of patients: interrupted, it goes on when called again; done, it is only named.
    """
    rows = camus.select(table, "training", patients=profile.patients)
    who = hashlib.sha256("\n".join([table.attrs["root"], *rows["patient"]]).encode()).hexdigest()[
        :8
    ]
    kept = assets.workspace() / "trained"
    folder = kept / f"{table.attrs['world']}-{profile.name}-{who}" / model
    if (folder / "training.json").exists():
        return folder
    needs = {name: assets.checkpoint("camus", name) for name in training.builds_on(model, profile)}
    if needs:  # the geometry of the frames that the shipped networks learned from
        shipped = checkpoints.load_generator(assets.checkpoint("camus", model))
        profile = replace(
            profile,
            latent_channels=shipped.latent_shape[0],
            side=shipped.side,
            stretched=shipped.stretched,
        )
    if "clip" in needs:
        width = checkpoints.load_clip(needs["clip"])[0].config.text_config.hidden_size
        profile = replace(profile, clip_width=width)
    cache = assets.workspace() / "cache"
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


def begin(name, data_root):
    """What a chapter works on: (profile, table of frames); prints which they are.

    name: of a profile; empty: "gpu" where PyTorch finds one, else "cpu". data_root: CAMUS in any form
    that `releases` knows; empty: the profile's phantom, written where it is missing.
    """
    import torch

    gpu = torch.cuda.is_available()
    profile = profiles.get(name or ("gpu" if gpu else "cpu"))
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
