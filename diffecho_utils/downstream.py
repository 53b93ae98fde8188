"""Do the images serve? Segmentation and classification networks, trained and scored.

Chapters 02 to 10, and the phantom's measurement. The networks are trained by the one loop
(`training.fit`), so a run is a function of its seed.
"""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from monai.metrics import compute_hausdorff_distance
from torchmetrics.functional import classification as scoring

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
QUESTIONS = ("class", "view", "phase")
# Rows of `profiles.Recipe` that differ from the profile's. The paper's 300 epochs are the steps to give.
RECIPES = {
    "tuned": {},
    "paper": {"learning_rate": 1e-3, "warmup": 0, "weight_decay": 0.0, "ema": 0.0},
}
LABEL_WEIGHTS = (0.05, 0.25, 0.35, 0.35)  # of the paper's cross-entropy: background, LV, wall, LA


def with_synthetic(real, drawn, share, seed=0):
    """Real frames and, of each class, `share` times as many synthetic ones: `data.Frames`.

    Which of a larger set is drawn with `seed`. Raises DiffEchoError for a class with too few.
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
    run, recipe = {
        "segmentation": (segmentation_run, profile.segmenter),
        "classification": (classification_run, profile.classifier),
    }[task]
    steps, runs = steps or recipe.steps, []
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
    named = sorted(set(firsts[0].index) & set(firsts[1].index))
    both = [patient for patient in named if _same_picture(*(rows.loc[patient] for rows in firsts))]
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


def _same_picture(ours, theirs):
    if ours["image"] == theirs["image"]:
        return True
    return np.array_equal(camus.read_frame(ours)[0], camus.read_frame(theirs)[0])


def check_label_maps(frames, name):
    """Raise DiffEchoError if a synthetic set, read as `frames` from `name`, lacks label maps."""
    lost = int((frames.table["label_map"].fillna("") == "").sum())
    if lost:
        raise DiffEchoError(
            f"{name}: {lost} of {len(frames)} images have no label map and cannot teach a segmenter; "
            "sample a set with text-seg or sdm, and --masks"
        )


def train_segmenter(frames, profile, *, seed=0, recipe=None, say=print):
    """A MONAI UNet trained on `frames` (data.Frames): (network in evaluation mode, log).

    recipe: default the profile's; say: is given a line of text now and then.
    """
    torch.manual_seed(seed)
    objective = objectives.SegmentationObjective(models.build_segmenter(profile))
    tensors = {"images": frames.images, "masks": frames.masks}
    log, _ = _fit(objective, tensors, recipe or profile.segmenter, seed, say)
    return objective.network, log


def segmentation_run(
    frames, test, profile, *, seed=0, recipe="tuned", steps=None, points=8, say=print, **amounts
):
    """Train one segmenter on `frames`, score it on `test` (data.Frames both): a run's values.

    recipe: "tuned", the profile's, or "paper", the paper's network, loss and schedule without
    average of the weights; steps: of the optimiser, default the recipe's; amounts: those of
    `data.jitter`. Of every test frame `dice`, hd95 (`hausdorff`), atrium (`atrium_errors`); ef, of each
    patient (map's, read) in %, NaN where it cannot be measured; curve, the mean Dice of each structure
    at `points` steps on the way, with the averaged weights.
    """
    if recipe not in RECIPES:
        raise DiffEchoError(f"no recipe {recipe!r}; choose one of {', '.join(RECIPES)}")
    torch.manual_seed(seed)
    if recipe == "paper":
        network, weights = models.build_paper_segmenter(frames.side), LABEL_WEIGHTS
    else:
        network, weights = models.build_segmenter(profile), None
    objective = objectives.SegmentationObjective(network, weights, **amounts)
    tensors = {"images": frames.images, "masks": frames.masks}
    chosen = _changed(profile.segmenter, RECIPES[recipe], steps)

    def look():
        return np.nanmean(dice(segment(network, test.images), test.masks), 0)

    log, curve = _fit(objective, tensors, chosen, seed, say, points, look)
    read = segment(network, test.images)
    given, seen = (anatomy.patients_ef(masks, test.table) for masks in (test.masks, read))
    fractions = np.column_stack([given["ef"], seen["ef"]]).round(2)
    return _facts("segmentation", {"recipe": recipe}, seed, chosen, frames, log, test) | {
        "dice": dice(read, test.masks).round(4),
        "hd95": hausdorff(read, test.masks).round(2),
        "atrium": atrium_errors(read, test.masks).round(3),
        "ef": dict(zip(given["patient"], fractions, strict=True)),
        "curve": curve,
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
    say=print,
    **amounts,
):
    """Train one classifier of the four classes on `frames`, score it on `test`: a run's values.

    network: as `classification_network`, which may start with ImageNet's weights (`pretrained`) and
    train only its last layers (`last`: at least so many weights; the paper's are two million); side:
    pixels to shrink the frames to; recipe: rows of `profiles.Recipe` that differ from the profile's.
    probabilities of every test frame, the four classes' in the order of `camus.CLASSES`; curve, at
    `points` steps on the way the shares of test frames whose class, view and phase are recognised;
    and `classification_scores`. The rest as in `segmentation_run`.
    """
    torch.manual_seed(seed)
    classifier = classification_network(network, profile, pretrained)
    if last is not None:
        classifier.freeze_all_but(last)
    images, tests = (data.resized(x.images, side or frames.side) for x in (frames, test))
    tensors = {"images": images, "labels": frames.classes}
    tensors["masks"] = frames.masks[:, :1, :1]  # of no use here
    objective = objectives.ClassificationObjective(classifier, **amounts)
    chosen = _changed(profile.classifier, recipe or {}, steps)

    def look():
        found = class_accuracies(classify(classifier, tests), test.classes)
        return [found[question] for question in QUESTIONS]

    log, curve = _fit(objective, tensors, chosen, seed, say, points, look)
    chances = classify(classifier, tests)
    settings = {"network": network, "pretrained": pretrained, "side": images.shape[-1]}
    settings["parameters"] = models.count_parameters(classifier)
    return _facts("classification", settings, seed, chosen, frames, log, test) | {
        "probabilities": chances.numpy().round(4),
        "scores": classification_scores(chances, test.classes),
        "curve": curve,
    }


def classification_network(name, profile, pretrained=False):
    """The network of this name to train: "small", the profile's own, or one of `backbones.BACKBONES`."""
    if name == "small":
        return models.build_classifier(profile)
    return backbones.Backbone(name, pretrained=pretrained)


def _changed(recipe, changes, steps):
    """The recipe with these changes and, if given, so many steps; the warm-up is a quarter at most."""
    chosen = replace(recipe, **changes)
    steps = steps or chosen.steps
    return replace(chosen, steps=steps, warmup=min(chosen.warmup, steps // 4))


def _fit(objective, tensors, recipe, seed, say, points=0, look=None):
    """Train the objective's network: (log, curve), at `points` steps on the way [step, *look()]."""
    stops, curve = {round(recipe.steps * (k + 1) / points) for k in range(points)} - {0}, []
    watch = stops, lambda step: curve.append([step, *look()])
    log = training.fit(objective, tensors, recipe, None, seed=seed, say=say, watch=watch)
    objective.network.eval()
    return log, np.round(curve, 4)


def _facts(task, settings, seed, recipe, frames, log, test):
    """What the values of both tasks' runs begin with."""
    return (
        {"version": RUN_VERSION, "task": task}
        | settings
        | {
            "seed": seed,
            "steps": recipe.steps,
            "batch": recipe.batch,
            "frames": len(frames),
            "seconds": log["seconds"].sum(),
            "patient": test.table["patient"].tolist(),
            "class": test.classes.tolist(),
        }
    )


def segment(network, images):
    """Label maps of images (N, 1, H, W) in [-1, 1]: (N, H, W) uint8 on the CPU."""
    return data.in_batches(lambda x: network(x).argmax(1).to(torch.uint8), images, network)


def classify(network, images):
    """Probabilities of the four classes: (N, 4) float32 on the CPU."""
    return data.in_batches(lambda x: network(x).softmax(1), images, network)


def dice(predicted, truth):
    """Dice of each frame and structure: (N, H, W) uint8 twice -> (N, 3) float64, as `STRUCTURES`.

    NaN where neither map has the structure; 0 where only one has it.
    """
    predicted, truth = _structures(predicted), _structures(truth)
    common, both = (predicted * truth).sum((2, 3)), (predicted + truth).sum((2, 3))
    return (2 * common / both).double().numpy()


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


def _structures(masks):
    cavity, wall, atrium = (
        masks == camus.LABELS[name] for name in ("LV cavity", "myocardium", "LA")
    )
    return torch.stack([cavity, cavity | wall, atrium], 1).float()


def atrium_errors(predicted, truth):
    """What became of the atrium in each frame: (N, 3) shares, what the paper's failures differ in.

    Of the given atrium's pixels the share read as cavity, and as cavity or myocardium; of the pixels
    read as atrium the share that lies outside the given one. NaN where there is no such atrium.
    """
    cavity, ventricle, read = _structures(predicted).bool().unbind(1)
    given = truth == camus.LABELS["LA"]
    parts = [(cavity & given, given), (ventricle & given, given), (read & ~given, read)]
    shares = [part.sum((1, 2)) / whole.sum((1, 2)) for part, whole in parts]
    return torch.stack(shares, 1).double().numpy()


def class_accuracies(probabilities, classes):
    """Share of frames whose view, phase, and both are recognised: {"view", "phase", "class"}."""
    found, truth = probabilities.argmax(1).numpy(), np.asarray(classes)
    phases = len(camus.PHASES)
    return {
        "view": float((found // phases == truth // phases).mean()),
        "phase": float((found % phases == truth % phases).mean()),
        "class": float((found == truth).mean()),
    }


def classification_scores(probabilities, classes):
    """{"class", "view", "phase"}: accuracy, precision, recall, f1 (macro) and calibration_error.

    probabilities (N, 4), classes (N,); see `classification_questions`. The calibration error is the
    mean gap between certainty and accuracy in ten bins (Guo et al. 2017).
    """
    questions = classification_questions(torch.as_tensor(probabilities), torch.as_tensor(classes))
    found = {}
    for name, (chance, answer) in questions.items():
        kinds = {"task": "multiclass", "num_classes": chance.shape[1]}
        macro = kinds | {"average": "macro"}
        scores = {
            "accuracy": scoring.accuracy(chance, answer, **kinds, average="micro"),
            "precision": scoring.precision(chance, answer, **macro),
            "recall": scoring.recall(chance, answer, **macro),
            "f1": scoring.f1_score(chance, answer, **macro),
            "calibration_error": scoring.calibration_error(chance, answer, **kinds, n_bins=10),
        }
        found[name] = {score: value.item() for score, value in scores.items()}
    return found


def classification_questions(probabilities, classes):
    """{"class", "view", "phase"}: (probabilities of its answers (N, K), the right ones (N,)).

    Of tensors (N, 4), (N,); those of view and phase are sums of the four classes' probabilities.
    """
    pairs = probabilities.unflatten(1, (len(camus.VIEWS), len(camus.PHASES)))
    # A sum a rounding error above 1 would be taken for a logit by torchmetrics
    view, phase = (pairs.sum(axis).clamp(max=1) for axis in (2, 1))
    return {
        "class": (probabilities, classes),
        "view": (view, classes // len(camus.PHASES)),
        "phase": (phase, classes % len(camus.PHASES)),
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
    scores = []
    for _, rows in metrics.by_class(classes):
        found = {"similarity": metrics.self_similarity(images[rows])}
        found["brightness"] = 127.5 * (images[rows].mean().item() + 1)
        recognised = class_accuracies(seen[rows], classes[rows])
        found |= {f"{question}_seen": share for question, share in recognised.items()}
        if read is not None:
            overlap = dice(read[rows], masks[rows])
            found["dice"] = np.nanmean(overlap) if np.isfinite(overlap).any() else np.nan
            drawn, asked = (anatomy.areas(m[rows])[:, 0] for m in (read, masks))
            found["area_error"] = 100 * np.abs(drawn - asked).mean() / asked.mean()
        scores.append(found)
    return pd.DataFrame(scores).to_dict("list")


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
