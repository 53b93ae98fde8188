"""Do the images serve? Segmentation and classification networks, trained and scored.

Chapters 02 to 08, and the phantom's measurement. `train_segmenter` calls the one training loop
(`training.fit`), so a run resumes and is a function of its seed.
"""

import numpy as np
import torch
from monai.metrics import compute_dice

from diffecho_utils import anatomy, camus, metrics, models, training

STRUCTURES = ("LV cavity", "LV epicardium", "LA")  # epicardium: cavity and myocardium together


def train_segmenter(
    frames, profile, *, seed=0, state=None, resume=False, progress=print, recipe=None, **amounts
):
    """A MONAI UNet trained on `frames` (data.Frames): (network in evaluation mode, log).

    `amounts` are those of `data.jitter`; recipe: default the profile's.
    """
    torch.manual_seed(seed)
    network = models.build_segmenter(profile)
    tensors = {"images": frames.images, "masks": frames.masks}
    log = training.fit(
        training.SegmentationObjective(network, **amounts),
        tensors,
        recipe or profile.segmentation,
        state,
        resume=resume,
        seed=seed,
        progress=progress,
    )
    return network.eval(), log


@torch.no_grad()
def segment(network, images, batch=64):
    """Label maps of images (N, 1, H, W) in [-1, 1]: (N, H, W) uint8 on the CPU."""
    device = next(network.parameters()).device
    parts = [
        network(part.to(device)).argmax(1).to(torch.uint8).cpu() for part in images.split(batch)
    ]
    return torch.cat(parts)


@torch.no_grad()
def classify(network, images, batch=64):
    """Probabilities of the four classes: (N, 4) float32 on the CPU."""
    device = next(network.parameters()).device
    parts = [network(part.to(device)).softmax(1).cpu() for part in images.split(batch)]
    return torch.cat(parts)


def dice(predicted, truth):
    """Dice of each frame and structure: (N, H, W) uint8 twice -> (N, 3) float64, as `STRUCTURES`.

    NaN where neither map has the structure; 0 where only the prediction has it.
    """
    scores = compute_dice(_structures(predicted), _structures(truth), ignore_empty=False)
    both_empty = (_structures(predicted).sum((2, 3)) + _structures(truth).sum((2, 3))) == 0
    scores[both_empty] = torch.nan
    return scores.double().numpy()


def class_accuracies(probabilities, classes):
    """Share of frames whose view, phase, and both are recognised: {"view", "phase", "class"}."""
    found, truth = probabilities.argmax(1).numpy(), np.asarray(classes)
    phases = len(camus.PHASES)
    return {
        "view": float((found // phases == truth // phases).mean()),
        "phase": float((found % phases == truth % phases).mean()),
        "class": float((found == truth).mean()),
    }


def read_by_judges(judges, images, classes, masks=None):
    """What trained networks see in a set of images: {score: five values, of each class and of all}.

    judges: (segmenter, classifier), trained on real frames; images (N, 1, H, W); classes (N,), as
    asked for; masks (N, H, W), the label maps asked for. view_seen, phase_seen, class_seen: share
    recognised; similarity: `metrics.self_similarity`; brightness: mean grey value of 0 to 255;
    with masks also dice, the mean over structures, and area_error of the cavity, in % of its area.
    """
    segmenter, classifier = judges
    seen = classify(classifier, images)
    read = None if masks is None else segment(segmenter, images)
    scores = {}
    for index in (*range(len(camus.CLASSES)), None):
        rows = np.flatnonzero(classes == index) if index is not None else np.arange(len(classes))
        found = {"similarity": metrics.self_similarity(images[rows])}
        found["brightness"] = 127.5 * (images[rows].mean().item() + 1)
        recognised = class_accuracies(seen[rows], classes[rows])
        found |= {f"{name}_seen": value for name, value in recognised.items()}
        if read is not None:
            overlap = dice(read[rows], masks[rows])
            found["dice"] = np.nanmean(overlap) if np.isfinite(overlap).any() else np.nan
            drawn, asked = (anatomy.areas(m[rows])[:, 0] for m in (read, masks))
            found["area_error"] = 100 * np.abs(drawn - asked).mean() / asked.mean()
        for name, value in found.items():
            scores.setdefault(name, []).append(float(value))
    return scores


def _structures(masks):
    cavity, myocardium, atrium = (
        masks == camus.LABELS[name] for name in ("LV cavity", "myocardium", "LA")
    )
    return torch.stack([cavity, cavity | myocardium, atrium], 1).float()
