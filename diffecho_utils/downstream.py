"""Do the images serve? Segmentation and classification networks, trained and scored.

Chapters 02 to 10, and the phantom's measurement. `train_segmenter` calls the one training loop
(`training.fit`), so a run resumes and is a function of its seed.
"""

import warnings
from dataclasses import replace

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from torchmetrics.functional.classification import (
    accuracy,
    calibration_error,
    f1_score,
    precision,
    recall,
)

from diffecho_utils import (
    DiffEchoError,
    anatomy,
    assets,
    backbones,
    camus,
    checkpoints,
    data,
    metrics,
    models,
    objectives,
    synthetic,
    training,
)

RUN_VERSION = 1  # of a run's values; raise it when their meaning changes
STRUCTURES = ("LV cavity", "LV epicardium", "LA")  # epicardium: cavity and myocardium together
# Rows of `profiles.Recipe` that differ from the profile's. The paper's 300 epochs are the steps to give.
RECIPES = {
    "tuned": {},
    "paper": {"learning_rate": 1e-3, "warmup": 0, "weight_decay": 0.0, "ema": 0.0},
}
LABEL_WEIGHTS = (0.05, 0.25, 0.35, 0.35)  # of the paper's cross-entropy: background, LV, wall, LA


def train_segmenter(
    frames,
    profile,
    *,
    seed=0,
    state=None,
    restart=False,
    progress=print,
    recipe=None,
    as_paper=False,
    compiled=False,
    watch=None,
    **amounts,
):
    """A MONAI UNet trained on `frames` (data.Frames): (network in evaluation mode, log).

    `as_paper`: the paper's network and its weighted cross-entropy; compiled: by `torch.compile`,
    which takes a minute and then nearly halves a step on a CPU. `amounts` are those of
    `data.jitter`; recipe: default the profile's. watch: (steps, look), and `look(step, network)` is
    called after each of these steps.
    """
    torch.manual_seed(seed)
    if as_paper:
        network = models.build_paper_segmenter(frames.images.shape[-1])
    else:
        network = models.build_segmenter(profile)
    tensors = {"images": frames.images, "masks": frames.masks}
    weights = LABEL_WEIGHTS if as_paper else None
    objective = objectives.SegmentationObjective(network, weights, **amounts)
    if compiled:
        network.to(memory_format=torch.channels_last).compile()
    log = training.fit(
        objective,
        tensors,
        recipe or profile.segmentation,
        state,
        restart=restart,
        seed=seed,
        progress=progress,
        watch=watch and (watch[0], lambda step: watch[1](step, network)),
    )
    return network.eval(), log


def with_synthetic(real, drawn, share, seed=0):
    """Real frames and, of each class, `share` times as many synthetic ones: `data.Frames`.

    Which of a larger set are taken is drawn with `seed`. Raises DiffEchoError for a class with too
    few.
    """
    rng, rows = np.random.default_rng(seed), []
    for index, name in enumerate(camus.CLASS_NAMES):
        there = np.flatnonzero(drawn.classes.numpy() == index)
        wanted = round(share * int((real.classes == index).sum()))
        if len(there) < wanted:
            raise DiffEchoError(
                f"{len(there)} synthetic images of {name}, {wanted} are needed; "
                f"`sample --n {wanted}` draws so many"
            )
        rows.append(rng.permutation(there)[:wanted])
    keep = np.isin(np.arange(len(drawn)), np.concatenate(rows))
    return data.joined(real, drawn.where(keep))


def arm(
    name,
    task,
    real,
    test,
    profile,
    *,
    drawn=None,
    share=1.0,
    seeds=1,
    steps=None,
    match_epochs=False,
    **settings,
):
    """An arm of an experiment: runs of the seeds 0, 1, ..., each with `name` as its "arm".

    They learn from `real`, with `share` frames of a synthetic set (`drawn`, data.Frames) for each
    real one, or, where share is None, from the set alone. All arms make the same number of steps, by
    default the recipe's, unless `match_epochs` wants more for more frames. task: "segmentation" or
    "classification"; `settings` go to `segmentation_run` or `classification_run`.
    """
    run = {"segmentation": segmentation_run, "classification": classification_run}[task]
    steps, runs = steps or getattr(profile, task).steps, []
    for seed in range(seeds):
        frames = real if drawn is None else drawn
        if drawn is not None and share is not None:
            frames = with_synthetic(real, drawn, share, seed)
        planned = round(steps * len(frames) / len(real)) if match_epochs else steps
        print(f"{name}, seed {seed}: {len(frames)} frames")
        made = run(frames, test, profile, seed=seed, steps=planned, **settings)
        runs.append(made | {"arm": name})
    return runs


def check_apart(training_rows, test_rows):
    """Raise DiffEchoError if a patient is in both tables, or one lacks a class.

    In two folders one name may stand for two patients: those with the same picture are the same.
    """
    firsts = [rows.groupby("patient").first() for rows in (training_rows, test_rows)]
    both = [
        patient
        for patient in sorted(set(firsts[0].index) & set(firsts[1].index))
        if _same_picture(*(rows.loc[patient] for rows in firsts))
    ]
    if both:
        raise DiffEchoError(
            f"{len(both)} patients are in the training and in the test frames (first: {both[0]}); "
            "choose two different splits, or another folder for the test"
        )
    for name, rows in (("training", training_rows), ("test", test_rows)):
        there = set(zip(rows["view"], rows["phase"], strict=True))
        lost = [f"{v}-{p}" for v, p in camus.CLASSES if (v, p) not in there]
        if lost:
            raise DiffEchoError(f"no {name} frame of {', '.join(lost)}; give a complete split")


def check_label_maps(frames, name):
    """Raise DiffEchoError if a synthetic set, read as `frames` from `name`, lacks label maps."""
    lost = int((frames.table["label_map"].fillna("") == "").sum())
    if lost:
        raise DiffEchoError(
            f"{name}: {lost} of {len(frames)} images have no label map and cannot teach a segmenter; "
            "sample a set with text-seg or sdm, and --masks"
        )


def score_segmenter(network, frames):
    """Scores on `frames`: {"dice": (N, 3), "hd95": (N, 3), "atrium": (N, 3), "ef": {patient:
    (map's, read)}}; atrium as `atrium_errors`.

    hd95: 95th percentile of the distance between the outlines, in pixels, NaN where either is
    missing; ef in %, NaN where it cannot be measured.
    """
    read = segment(network, frames.images)
    fractions = [metrics.ejection_fractions(frames, masks) for masks in (frames.masks, read)]
    return {
        "dice": dice(read, frames.masks),
        "hd95": hausdorff(read, frames.masks),
        "atrium": atrium_errors(read, frames.masks),
        "ef": {
            patient: (fractions[0][patient], fractions[1].get(patient, np.nan))
            for patient in fractions[0].index
        },
    }


def atrium_errors(predicted, truth):
    """What became of the atrium in each frame: (N, 3) shares, what the paper's failures differ in.

    Of the given atrium's pixels the share read as cavity, and as cavity or myocardium; of the pixels
    read as atrium the share that lies outside the given one. NaN where there is no such atrium.
    """
    cavity, wall, atrium = (camus.LABELS[name] for name in ("LV cavity", "myocardium", "LA"))
    given, read = (masks == atrium for masks in (truth, predicted))
    inside = [
        ((predicted == cavity) & given),
        ((predicted == cavity) | (predicted == wall)) & given,
        read & ~given,
    ]
    shares = [
        part.sum((1, 2)) / whole.sum((1, 2))
        for part, whole in zip(inside, (given, given, read), strict=True)
    ]
    return torch.stack(shares, 1).double().numpy()


def hausdorff(predicted, truth):
    """95 % Hausdorff distance of each frame and structure, in pixels: (N, 3) float64, NaN if empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty structures, which become NaN below
        distances = compute_hausdorff_distance(
            _structures(predicted), _structures(truth), include_background=True, percentile=95
        )
    found = distances.double().numpy()
    found[~np.isfinite(found)] = np.nan
    return found


def segmentation_run(
    frames, test, profile, *, seed=0, recipe="tuned", steps=None, points=8, **running
):
    """Train one segmenter on `frames`, score it on `test` (data.Frames both): a run's values.

    recipe: "tuned", the profile's, or "paper", the paper's network, loss and schedule without
    average of the weights. steps: of the optimiser, default the recipe's. Scores of every test
    frame, as `score_segmenter`, and `curve`, the mean Dice of each structure at `points` steps on
    the way, with the averaged weights. `running` goes to `train_segmenter`.
    """
    if recipe not in RECIPES:
        raise DiffEchoError(f"no recipe {recipe!r}; choose one of {', '.join(RECIPES)}")
    chosen, stops = _plan(profile.segmentation, RECIPES[recipe], steps, points)
    curve = []

    def look(step, network):
        overlap = dice(segment(network, test.images), test.masks)
        curve.append([step, *np.nanmean(overlap, 0)])

    network, log = train_segmenter(
        frames,
        profile,
        seed=seed,
        recipe=chosen,
        as_paper=recipe == "paper",
        watch=(stops, look),
        **running,
    )
    scores = score_segmenter(network, test)
    return {
        "version": RUN_VERSION,
        "task": "segmentation",
        "recipe": recipe,
        "seed": seed,
        "steps": chosen.steps,
        "batch": chosen.batch,
        "frames": len(frames),
        "seconds": log["seconds"].sum(),
        "patient": test.table["patient"].tolist(),
        "class": test.classes.tolist(),
        "dice": scores["dice"].round(4),
        "hd95": scores["hd95"].round(2),
        "atrium": scores["atrium"].round(3),
        "ef": {patient: np.round(pair, 2) for patient, pair in scores["ef"].items()},
        "curve": np.round(curve, 4),
    }


def classification_run(
    frames,
    test,
    profile,
    *,
    network="resnet18",
    side=None,
    seed=0,
    steps=None,
    points=10,
    pretrained=False,
    last=None,
    recipe=None,
    **running,
):
    """Train one classifier of the four classes on `frames`, score it on `test`: a run's values.

    network: "small", the profile's, or one of `backbones.BACKBONES`, which may start with ImageNet's
    weights (`pretrained`) and train only their last layers (`last`: at least so many weights; the
    paper's are two million); side: pixels to shrink the frames to; recipe: rows of `profiles.Recipe`
    that differ from the profile's. Probabilities of every test frame, the four classes' in the order
    of `camus.CLASSES`; `curve`, at `points` steps on the way the shares of test frames whose class,
    view and phase are recognised; and `classification_scores`. `running`: amounts of `data.jitter`,
    state, restart and progress.
    """
    torch.manual_seed(seed)
    chosen, stops = _plan(profile.classification, recipe or {}, steps, points)
    classifier, curve = classification_network(network, profile, pretrained), []
    if last is not None:
        classifier.freeze_all_but(last)
    side = side or frames.images.shape[-1]
    images, tests = (data.resized(part.images, side) for part in (frames, test))
    fitting = {
        name: running.pop(name) for name in ("state", "restart", "progress") if name in running
    }

    def look(step):
        found = class_accuracies(classify(classifier, tests), test.classes)
        curve.append([step, *(found[name] for name in ("class", "view", "phase"))])

    log = training.fit(
        objectives.ClassificationObjective(classifier, **running),
        {
            "images": images,
            "masks": torch.zeros(len(images), 1, 1, dtype=torch.uint8),  # not needed here
            "labels": frames.classes,
        },
        chosen,
        fitting.pop("state", None),
        seed=seed,
        watch=(stops, look),
        **fitting,
    )
    chances = classify(classifier.eval(), tests)
    return {
        "version": RUN_VERSION,
        "task": "classification",
        "network": network,
        "pretrained": pretrained,
        "side": images.shape[-1],
        "parameters": models.count_parameters(classifier),
        "seed": seed,
        "steps": chosen.steps,
        "batch": chosen.batch,
        "frames": len(frames),
        "seconds": log["seconds"].sum(),
        "patient": test.table["patient"].tolist(),
        "class": test.classes.tolist(),
        "probabilities": chances.numpy().round(4),
        "scores": classification_scores(chances, test.classes),
        "curve": np.round(curve, 4),
    }


def classification_network(name, profile, pretrained=False):
    """The network of this name to train: "small", the profile's own, or one of `backbones.BACKBONES`."""
    if name == "small":
        return models.build_classifier(profile)
    return backbones.Backbone(name, pretrained=pretrained)


def classification_scores(probabilities, classes):
    """{"class", "view", "phase"}: accuracy, precision, recall, f1 (macro) and calibration_error.

    Those of view and phase from the sums of the four classes' probabilities: (N, 4), (N,). The
    calibration error is the mean gap between certainty and accuracy in ten bins (Guo et al. 2017).
    """
    questions = classification_questions(torch.as_tensor(probabilities), torch.as_tensor(classes))
    found = {}
    for name, (chance, answer) in questions.items():
        kinds = {"task": "multiclass", "num_classes": chance.shape[1]}
        macro = kinds | {"average": "macro"}
        found[name] = {
            "accuracy": accuracy(chance, answer, **kinds, average="micro"),
            "precision": precision(chance, answer, **macro),
            "recall": recall(chance, answer, **macro),
            "f1": f1_score(chance, answer, **macro),
            "calibration_error": calibration_error(chance, answer, **kinds, n_bins=10),
        }
        found[name] = {score: value.item() for score, value in found[name].items()}
    return found


def classification_questions(probabilities, classes):
    """{"class", "view", "phase"}: (probabilities of its answers (N, K), the right ones (N,)).

    Those of view and phase are sums of the four classes' probabilities: tensors (N, 4) and (N,).
    """
    pairs = probabilities.unflatten(1, (len(camus.VIEWS), len(camus.PHASES)))
    # A sum a rounding error above 1 would be taken for a logit by torchmetrics
    view, phase = (pairs.sum(axis).clamp(max=1) for axis in (2, 1))
    return {
        "class": (probabilities, classes),
        "view": (view, classes // len(camus.PHASES)),
        "phase": (phase, classes % len(camus.PHASES)),
    }


def _plan(recipe, changes, steps, points):
    """(recipe with its changes and this many steps, the steps at which its curve has a point)."""
    chosen = replace(recipe, **changes)
    chosen = replace(chosen, steps=steps or chosen.steps)
    chosen = replace(chosen, warmup=min(chosen.warmup, chosen.steps // 4))
    return chosen, {round(chosen.steps * (k + 1) / points) for k in range(points)} - {0}


def _same_picture(ours, theirs):
    if ours["image"] == theirs["image"]:
        return True
    pictures = [camus.read_frame(row)[0] for row in (ours, theirs)]
    return pictures[0].shape == pictures[1].shape and (pictures[0] == pictures[1]).all()


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


def evaluate(folder, root, split, see, patients=None):
    """How near the synthetic set in `folder` comes to real frames: a table, a row a class, "all" last.

    `metrics.panel` of the features see(images) (`metrics.feature_space`): the reference are the
    training frames of the CAMUS folder `root`, the floor is that of its frames of `split`, of at most
    `patients` patients each. Beside it `read_by_judges` of the set and, as <name>_floor, of the
    frames of `split`; the judges are the shipped ones. Raises DiffEchoError for a set or a split
    that lacks a class, and for images that nothing can be said about.
    """
    images, table = synthetic.read(folder)
    geometry = data.Geometry(images.shape[-1], table.attrs["stretched"])
    reference, held_out = (
        data.open_frames(root, part, geometry, patients) for part in ("training", split)
    )
    for name, rows in ((folder, table), ("training", reference.table), (split, held_out.table)):
        there = set(camus.class_index(rows))
        lost = [kind for index, kind in enumerate(camus.CLASS_NAMES) if index not in there]
        if lost:
            raise DiffEchoError(
                f"{name}: no frames of {', '.join(lost)}, and the classes are compared one by one; take a "
                "folder and a set with all four (training and sampling do with fewer)"
            )
    metrics.check_images(images, names=[f"{folder}/{name}" for name in table["file_name"]])
    masks = synthetic.read_label_maps(folder, table, geometry.side)
    classes, real_classes = camus.class_index(table), held_out.classes.numpy()
    values = metrics.panel(
        see(images),
        classes,
        see(reference.images),
        reference.classes.numpy(),
        see(held_out.images),
        real_classes,
        held_out.table["patient"].to_numpy(),
    )
    judges = [
        checkpoints.load_network(assets.checkpoint("camus", name)).to(models.device())
        for name in ("segmenter", "classifier")
    ]
    truth = None if masks is None else held_out.masks
    mine = read_by_judges(judges, images, classes, masks)
    real = read_by_judges(judges, held_out.images, real_classes, truth)
    for score in mine:
        values[score], values[f"{score}_floor"] = mine[score], real[score]
    return values


def _structures(masks):
    cavity, myocardium, atrium = (
        masks == camus.LABELS[name] for name in ("LV cavity", "myocardium", "LA")
    )
    return torch.stack([cavity, cavity | myocardium, atrium], 1).float()
