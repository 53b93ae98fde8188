"""What an autoencoder keeps with 4, 8 or 16 channels, after one stage of training or both.

--autoencoders holds `first-4`, `first-8`, `first-16`, `both-4`, ...: checkpoints that `train autoencoder
--latent-channels C` wrote, after the first stage alone and after both. All are measured on the validation
patients, with the shipped segmenter as the reader. Beside the record lie the reconstructions of one phantom
frame as autoencoders.safetensors, because no frame of CAMUS may: chapter 02 shows both. 2 minutes on one core.
"""

from pathlib import Path

import numpy as np
import torch
from world import by_structure, dice_of, patients, phantom_folder

from diffecho_utils import (
    DiffEchoError,
    camus,
    checkpoints,
    data,
    files,
    intervals,
    metrics,
    results,
)

SEEDS, SPLIT, USES = [], "validation", ("segmenter",)


def rows(world, autoencoders=Path("autoencoders")):
    named = {"original": {}}
    for start, stages in (("first", "first stage"), ("both", "both stages")):
        folders = {int(f.name.split("-")[1]): f for f in autoencoders.glob(f"{start}-*")}
        if not folders:
            raise DiffEchoError(
                f"{autoencoders}: no {start}-4 and so on; --help says what they are"
            )
        for channels in sorted(folders):
            named[f"{channels} channels, {stages}"] = {"folder": folders[channels]}
    return named


def compute(world, folder=None):
    """What is measured on the frames, or on what an autoencoder makes of them, and a phantom frame with it."""
    real, found = world.frames("validation"), {}
    simulated = camus.select(
        camus.read_table(phantom_folder(world.profile)), "validation", patients=1
    )
    images, picture = real.images, data.load_frames(simulated, world.judges[0]).images[:1]
    owners, (segmenter, _) = patients(real), world.judges
    if folder:
        vae = checkpoints.load_autoencoder(folder)
        images, picture = (data.decode(vae, data.encode(vae, x)) for x in (images, picture))
        for name, score in {"psnr": metrics.psnr, "ms_ssim": metrics.ms_ssim}.items():
            found[name] = intervals.mean(score(images, real.images).numpy(), owners)
    dice, on_real = (dice_of(segmenter, x, real) for x in (images, real.images))
    spectra = [metrics.radial_spectrum(x)[1] for x in (images, real.images)]
    powers = [metrics.power_by_direction(x).mean(0) for x in (images, real.images)]
    directions = [10 * np.log10(power / power.mean()) for power in powers]
    found |= {
        "fine_detail": intervals.mean(metrics.high_frequency_deviation(images).numpy(), owners),
        # Root mean square differences of the mean spectra, radial and by direction
        "spectrum_db": np.sqrt(np.mean((spectra[0] - spectra[1]) ** 2)),
        "direction_db": np.sqrt(np.mean((directions[0] - directions[1]) ** 2)),
        "dice": by_structure(np.transpose([intervals.mean(scores, owners) for scores in dice.T])),
        # Mean Dice as a share of that on the real frames
        "dice_kept": intervals.bootstrap(
            lambda r: np.nanmean(dice[r]) / np.nanmean(on_real[r]), owners
        ),
    }
    pixels = (127.5 * (picture + 1)).round().byte().numpy()
    return {"row": found, "picture": pixels, "patients": len(set(owners)), "frames": len(real)}


def collect(world, found):
    pictures = {row: torch.tensor(v["picture"], dtype=torch.uint8) for row, v in found.items()}
    facts = {"world": "phantom", "licence": results.LICENCES["camus"]}  # drawn by CAMUS's decoders
    files.save_tensors(world.out / "autoencoders.safetensors", pictures, facts)
    counts = {name: found["original"][name] for name in ("patients", "frames")}
    return {"autoencoders": counts | {"rows": {row: v["row"] for row, v in found.items()}}}
