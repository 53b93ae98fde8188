"""What an autoencoder keeps with 4, 8 or 16 channels, after one stage of training or both.

    python benchmarks/autoencoders.py --data ROOT --first DIR... --both DIR...      (2 minutes on one core)

DIR: checkpoints that `train autoencoder --latent-channels C` wrote, after the first stage alone and after
both. All are measured on the validation patients of ROOT, with the shipped segmenter as the reader; the
numbers go to data/results/camus/cpu/autoencoders.json. Beside them lie the reconstructions of one
phantom frame as autoencoders.safetensors, because no frame of CAMUS may: chapter 02 shows both.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from diffecho_utils import (
    assets,
    camus,
    checkpoints,
    data,
    downstream,
    files,
    metrics,
    phantom,
    profiles,
    results,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="CAMUS folder")
    parser.add_argument("--first", type=Path, nargs="+", required=True, help="first stage only")
    parser.add_argument("--both", type=Path, nargs="+", required=True, help="both stages")
    options = parser.parse_args()
    profile = profiles.get("cpu")
    segmenter = checkpoints.load_network(assets.checkpoint("camus", "segmenter"))
    real = held_out(options.data, segmenter)
    simulated = assets.workspace() / f"phantom-{profile.name}"
    phantom.ensure(simulated, patients=profile.phantom_patients, seed=profile.phantom_seed)
    simulated = held_out(simulated, segmenter, patients=1).images[:1]

    rows = {"original": measure(real.images, real, segmenter)}
    pictures = {"original": simulated}
    for stage, folders in (("first stage", options.first), ("both stages", options.both)):
        for folder in folders:
            vae = checkpoints.load_autoencoder(folder)
            name = f"{vae.config.latent_channels} channels, {stage}"
            images = through(vae, real.images)
            rows[name] = fidelity(images, real) | measure(images, real, segmenter)
            pictures[name] = through(vae, simulated)
            print(name, rows[name], flush=True)

    folder = assets.root() / "data" / "results" / "camus" / profile.name
    results.save(
        folder,
        "autoencoders",
        {"patients": real.table["patient"].nunique(), "frames": len(real), "rows": rows},
        world=real.table.attrs["world"],
        profile=profile.name,
        command="python benchmarks/autoencoders.py --data /path/to/camus --first ... --both ...",
        split="validation",
    )
    bytes_ = {name: (127.5 * (x + 1)).round().to(torch.uint8) for name, x in pictures.items()}
    facts = {"world": "phantom", "licence": results.LICENCES["camus"]}  # drawn by CAMUS's decoders
    files.save_tensors(folder / "autoencoders.safetensors", bytes_, facts)


def held_out(root, like, patients=None):
    """The validation frames of a folder, in the geometry of the network that reads them."""
    rows = camus.select(camus.read_table(root), "validation", patients=patients)
    return data.load_frames(rows, like, cache_dir=assets.workspace() / "cache")


def through(vae, images):
    """Images encoded and decoded again."""
    return data.decode(vae, data.encode(vae, images))


def fidelity(images, real):
    """How close `images` are to the real frames that they reconstruct, pixel by pixel."""
    return {
        "psnr": interval(metrics.psnr(images, real.images).numpy(), real),
        "ms_ssim": interval(metrics.ms_ssim(images, real.images).numpy(), real),
    }


def measure(images, real, segmenter):
    """How like the real frames they are in texture, and how well their anatomy is read.

    Root mean square differences in dB of the two mean spectra, radial and by direction; `dice_kept`:
    the segmenter's mean Dice on `images` as a share of that on the real frames.
    """
    dice, on_real = (
        downstream.dice(downstream.segment(segmenter, x), real.masks) for x in (images, real.images)
    )

    def kept(rows):
        return np.nanmean(dice[rows]) / np.nanmean(on_real[rows])

    spectra = [metrics.radial_spectrum(x)[1] for x in (images, real.images)]
    powers = [metrics.power_by_direction(x).mean(0) for x in (images, real.images)]
    directions = [10 * np.log10(power / power.mean()) for power in powers]
    return {
        "fine_detail": interval(metrics.high_frequency_deviation(images).numpy(), real),
        "spectrum_db": rms(*spectra),
        "direction_db": rms(*directions),
        "dice": {
            part: interval(x, real) for part, x in zip(downstream.STRUCTURES, dice.T, strict=True)
        },
        "dice_kept": (
            kept(np.arange(len(real))),
            *metrics.bootstrap_interval(kept, real.table["patient"]),
        ),
    }


def interval(values, real):
    """(mean over frames, low, high) of values (N,): 95 % bootstrap interval over patients."""
    patients = real.table["patient"]
    return np.nanmean(values), *metrics.bootstrap_interval(
        lambda rows: np.nanmean(values[rows]), patients
    )


def rms(a, b):
    """Root mean square difference of two curves."""
    return np.sqrt(np.mean((a - b) ** 2))


if __name__ == "__main__":
    main()
