# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Segmentation with synthetic frames
#
# At the end of this chapter you have trained a segmenter on real frames, on drawn ones and on both, you know what each arm gains over plain augmentation, with an interval over patients, and you can say in what ways the result could fool you.

# %% [markdown]
# ## Overview
#
# What are synthetic echocardiograms good for? The paper's answer is a table: a segmentation network that sees real frames *and* generated ones segments real frames better, and learns faster. A generated frame comes with its label map for free, so the recipe would be cheap: draw a few thousand, mix, train.
#
# Whether it works is a matter of small differences, and small differences have many causes: a longer training, a lucky seed, easy patients, a control arm that was left poor. So most of this chapter is about making the comparison fair, and only its last part about reading it.
#
# You will learn to
#
# 1. read a table of arms, with intervals, before believing a word of it,
# 2. write the two losses of a segmenter by hand, and match them to MONAI,
# 3. score outlines by overlap, by distance and by the ejection fraction they lead to,
# 4. build the arms, and keep optimiser steps, patients and leakage under control,
# 5. train one arm while you read, and watch its curve,
# 6. compare arms in pairs over patients,
# 7. measure how many steps a threshold takes,
# 8. train on drawn frames alone, the hardest test of a generator,
# 9. ask the question again with few patients, without leakage,
# 10. find the failures, and sort them by a rule.

# %% [markdown]
# | | |
# |---|---|
# | Needs | [text and segmentation guidance](05_text_and_segmentation_guided.ipynb) and [the baseline](06_semantic_diffusion_baseline.ipynb): the generators; [sampling](07_sampling.ipynb): the synthetic sets |
# | Time | minutes on a CPU, less on a GPU; the live training of section 5 dominates. The times of your own build are in its status table |
# | Data | the folder in `data_root`, or the phantom; the small synthetic set that is shipped; recorded runs of every arm on CAMUS |
# | In the paper | Table 2 (segmentation), Figure 4 (failures), and the claim of faster convergence |

# %%
try:
    import diffecho_utils  # noqa: F401
except ImportError:  # on Colab: fetch the book and install its package, leaving torch alone
    # !git clone --quiet --depth 1 https://github.com/diffecho-book/diffecho-book
    # %cd diffecho-book/notebooks
    # %pip install --quiet ..

# %% tags=["parameters"]
data_root = ""  # a CAMUS folder; empty: the phantom, written on first use
profile_name = "cpu"  # smoke, cpu, gpu or paper: see the profiles' table in "How to run"
results_dir = ""  # where measured numbers are kept; empty: _build/results

# %%
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from monai.losses import DiceCELoss

# %%
from diffecho_utils import (
    assets,
    camus,
    data,
    downstream,
    metrics,
    models,
    phantom,
    plots,
    profiles,
    results,
    sampling,
)

profile = profiles.get(profile_name)
phantom_root = assets.workspace() / f"phantom-{profile_name}"
root = data_root or phantom.ensure(
    phantom_root, patients=profile.phantom_patients, seed=profile.phantom_seed
)
table = camus.read_table(root)
live = results.live(table, profile)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %% [markdown]
# ## 1. The result first
#
# Every arm was trained several times on CAMUS's training patients and scored on the validation patients: the same frames, the same number of optimiser steps, other seeds. One row is one arm.
#
# **Look for** rows whose bar lies to the right of the first row's, and at how much of the axis they move.

# %%
runs, skipped = downstream.read_runs(assets.root() / "data/results/camus/cpu/segmentation")
arms = {}
for run in runs:
    arms.setdefault(run["arm"], []).append(run)
source = results.describe(runs[0]["record"])


def mean_dice(run):
    return np.nanmean(np.array(run["dice"], dtype=float))


shown = {
    arm: (
        np.mean([mean_dice(run) for run in part]),
        min(mean_dice(run) for run in part),
        max(mean_dice(run) for run in part),
    )
    for arm, part in arms.items()
}
figure = plots.intervals(shown, "mean Dice of the three structures")
counts = {len(part) for part in arms.values()}
caption = f"""Mean, lowest and highest of {min(counts)} to {max(counts)} seeds, on
{len(runs[0]["dice"])} frames of {len(set(runs[0]["patient"]))} validation patients."""
plots.show(figure, caption, source)

# %% [markdown]
# The spread of one arm over its seeds is the first thing to take from this figure. Any claim that an arm is better must be larger than that, and it must hold for *patients*, of which there are fifty. Section 6 does this properly.
#
# ## 2. Two losses
#
# A segmenter gives four numbers for each pixel, one for each label. The paper trains its network by **cross-entropy** with weights, since three quarters of a frame are background and a network that says "background" everywhere would be right most of the time. The book's own recipe adds the **Dice loss**, one minus the overlap of probabilities and labels, which does not care how large a structure is. Both fit in a few lines.

# %%
def weighted_cross_entropy(logits, labels, weights):
    """Mean over pixels, each counted as often as its label's weight says."""
    chances = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    share = weights[labels]
    return -(share * chances).sum() / share.sum()


def dice_loss(logits, labels):
    """1 - 2 |overlap| / (|a| + |b|), mean over labels and frames."""
    chances = logits.softmax(1)
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).float()
    overlap = (chances * truth).sum((2, 3))
    return (1 - (2 * overlap + 1e-5) / (chances.sum((2, 3)) + truth.sum((2, 3)) + 1e-5)).mean()


# %%
logits = torch.randn(2, 4, 16, 16)
labels = torch.randint(0, 4, (2, 16, 16))
weights = torch.tensor(downstream.LABEL_WEIGHTS)
pairs = {
    "weighted cross-entropy": (
        weighted_cross_entropy(logits, labels, weights),
        F.cross_entropy(logits, labels, weights),
    ),
    "Dice + cross-entropy": (
        dice_loss(logits, labels) + F.cross_entropy(logits, labels),
        DiceCELoss(to_onehot_y=True, softmax=True)(logits, labels[:, None]),
    ),
}
for mine, theirs in pairs.values():
    torch.testing.assert_close(mine, theirs)
pd.DataFrame(pairs, index=["by hand", "library"]).T.astype(float).round(5)

# %% [markdown]
# ## 3. Three ways to score an outline
#
# **Dice** is overlap. It forgives a thin spur that reaches across the picture, since a spur has few pixels. The **Hausdorff distance** does not forgive: it is the largest distance from a point of one outline to the other outline, and, since one stray pixel should not decide, its 95th percentile is reported (HD95). And what a physician wants is neither, but the **ejection fraction**, in which errors of two phases may cancel or add.
#
# Take a real label map and spoil it in three ways with about the same number of wrong pixels.
#
# **Look for** the score that notices each.

# %%
rows = camus.select(table, "validation", patients=profile.patients)
# Stretched to a square, as CAMUS's common re-packs and so the shipped sets are
cache = assets.workspace() / "cache"
test = data.load_frames(rows, profile.side, keep_aspect=False, cache_dir=cache)
mask = test.masks[0]
side = mask.shape[-1]
thicker = F.max_pool2d((mask == 1)[None, None].float(), 3, 1, 1)[0, 0] > 0
spur = mask.clone()
grown = torch.where(thicker, torch.ones_like(mask), mask)
wrong = int((grown != mask).sum())
row, columns = int(torch.where(mask == 1)[0].float().mean()), max(1, wrong // 3)
spur[row : row + 3, -columns:] = 1
shifted = mask.roll(1, 1)
changed = {"a pixel too large": grown, "a spur": spur, "one pixel aside": shifted}
scores = {}
for name, other in changed.items():
    overlap = downstream.dice(other[None], mask[None])[0, 0]
    far = downstream.hausdorff(other[None], mask[None])[0, 0]
    scores[name] = {
        "wrong pixels": int((other != mask).sum()),
        "Dice, cavity": overlap,
        "HD95, cavity / pixels": far,
    }
pictures = torch.stack([test.images[0]] * 4)
titles = ["as it is", *changed]
figure = plots.frames(pictures, titles, torch.stack([mask, *changed.values()]))
plots.show(figure, "One label map, spoilt in three ways.", live)
pd.DataFrame(scores).T.round(3)

# %% [markdown]
# HD95 is in pixels here, because the public re-pack of CAMUS has lost its millimetres (chapter 1). It is NaN where a structure is missing altogether, and how often that happens must be told beside it.
#
# ## 4. A fair comparison
#
# An arm is a training set. What else changes when synthetic frames are added?
#
# - **Steps.** Twice the frames at the same number of epochs is twice the training. All arms of section 1 have the same number of *optimiser steps*; one arm of each kind has the same number of epochs instead, and says so.
# - **Augmentation.** A generated frame is a variation of real ones, and so is a rotated one, for nothing. The first arm has rotation, zoom, shift, gain and contrast, drawn anew for each batch. The paper's tables have no such arm.
# - **Leakage.** The generators saw the training patients only, and no arm sees a validation patient. But a generator trained on 400 patients carries what it learned from all 400 into any arm, so "50 real patients + synthetic" would be a lie. Section 9 trains generators on the few patients.
# - **Which frames.** Of a larger set, the seed of the run draws which are used. So the spread over seeds contains the luck of the draw.
#
# The package refuses what would break the comparison. Patients on both sides, for example:

# %%
from diffecho_utils import DiffEchoError  # noqa: E402

try:
    downstream.check_apart(rows, rows)
except DiffEchoError as error:
    display(Markdown(f"`DiffEchoError`: {error}"))

# %% [markdown]
# ## 5. One arm, live
#
# Train the network twice for a moment, on your folder's frames and on the same frames with the shipped synthetic set, which is small. Every few steps the averaged weights are scored on the validation frames.
#
# **Look for** which curve rises first, and whether it stays ahead.

# %%
known = camus.select(table, "training", patients=profile.patients)
real = data.load_frames(known, profile.side, keep_aspect=False, cache_dir=cache)
folder = assets.root() / "data" / "synthetic" / "camus" / "text-seg"
drawn = sampling.read_frames(folder, profile.side)
n = min(np.bincount(drawn.classes)) / max(np.bincount(real.classes))
live_arms = {"real": real, f"real + {n:.2g} drawn": downstream.with_synthetic(real, drawn, n)}
brief, line = profile.live_steps, display(Markdown("starting"), display_id=True)
lived = {}
for name, frames in live_arms.items():
    lived[name] = downstream.segmentation_run(
        frames,
        test,
        profile,
        steps=brief,
        points=6,
        progress=lambda text, name=name: line.update(Markdown(f"{name}: {text}")),
    )
curves = {
    name: ([row[0] for row in run["curve"]], [np.mean(row[1:]) for row in run["curve"]])
    for name, run in lived.items()
}
figure = plots.curves(curves, "optimiser steps", "mean Dice, validation frames")
plots.show(figure, f"{brief} steps, one seed.", live)

# %% [markdown]
# One seed and so few steps decide nothing; they show how the recorded runs were made. On the phantom, mind also that the drawn frames are echoes of real style: they may help the network on CAMUS and not here.
#
# ## 6. Arms in pairs
#
# All runs were scored on the same frames. So compare two arms frame by frame, average over seeds, and let the bootstrap resample *patients*. The difference of two arms has a much narrower interval than either arm, since the hard patients are hard for both.
#
# **Look for** intervals that do not touch zero, and ask in which of the three structures.

# %%
def gaps(arm, base="real", score="dice"):
    found = downstream.paired_difference(arms[arm], arms[base], score)
    return {f"{arm}: {part}": tuple(row) for part, row in zip(downstream.STRUCTURES, found)}


against = {}
for arm in arms:
    if arm != "real":
        against |= gaps(arm)
figure = plots.intervals(against, "Dice minus that of real frames with augmentation")
caption = "Paired over frames, mean over seeds; 95 % bootstrap intervals over patients."
plots.show(figure, caption, source)

# %%
table_of_arms = downstream.summary(runs)
table_of_arms.round(3)

# %% [markdown]
# The mean hides where a gain comes from. Look at the three structures apart, and at the distance, which notices other errors than the overlap does.

# %%
wide = {}
for arm in arms:
    if arm != "real":
        wide |= gaps(arm, score="hd95")
figure = plots.intervals(wide, "HD95 minus that of real frames / pixels")
plots.show(figure, "Below zero: nearer outlines than with real frames alone.", source)

# %% [markdown]
# ## 7. Faster?
#
# "Faster convergence" can be measured: how many optimiser steps does an arm need to reach a given mean Dice on the validation frames? Every run keeps its curve. The threshold must be one that all arms reach, and it is chosen by a rule: the lowest final value of any augmented arm, minus one hundredth.
#
# **Look for** arms that reach it in fewer steps, and for how much the seeds of one arm differ.

# %%
augmented = [run for run in runs if "not augmented" not in run["arm"] and "paper" not in run["arm"]]
threshold = min(np.mean(run["curve"][-1][1:]) for run in augmented) - 0.01
needed = {}
for run in augmented:
    needed.setdefault(run["arm"], []).append(downstream.steps_to(run, threshold))
shown = {arm: (np.mean(n), min(n), max(n)) for arm, n in needed.items()}
figure = plots.intervals(shown, f"steps to a mean Dice of {threshold:.3f}")
plots.show(figure, "Mean, lowest and highest of the seeds.", source)

# %%
curves = {}
for arm in ("real", "real + 1 text-seg", "real + 1 sdm", "text-seg alone", "sdm alone"):
    part = [np.array(run["curve"]) for run in arms.get(arm, [])]
    if part:
        curves[arm] = (part[0][:, 0], np.mean([c[:, 1:].mean(1) for c in part], 0))
figure = plots.curves(curves, "optimiser steps", "mean Dice, validation frames")
plots.show(figure, "Mean over seeds, averaged weights.", source)

# %% [markdown]
# ## 8. Drawn frames alone
#
# Train on synthetic frames only, test on real ones. It is the hardest test of a generator, since nothing corrects its habits. The published SDM (Stojanovski et al. 2023) gives 88.6 / 91.9 / 85.2 % for cavity, epicardium and atrium.

# %%
PUBLISHED = dict(zip(downstream.STRUCTURES, (0.886, 0.919, 0.852), strict=True))
rows = {"SDM, as published": {k: f"{v:.3f}" for k, v in PUBLISHED.items()}}
for arm, part in arms.items():
    if arm == "real" or arm.endswith("alone"):
        scores = np.mean([np.nanmean(np.array(r["dice"], dtype=float), 0) for r in part], 0)
        rows[arm] = {k: f"{v:.3f}" for k, v in zip(downstream.STRUCTURES, scores, strict=True)}
pd.DataFrame(rows).T

# %% [markdown]
# The networks, sizes and test patients of the published row are not this book's; it stands here as the yardstick that the field knows, not as a rival.

# %% [markdown]
# ## 9. Few patients, without leakage
#
# Where would one want synthetic data? Where real data are scarce. Then the generator has few patients, too, and a generator that was trained on 400 must not be used. In the second protocol generator and segmenter see the same 25, 50 or 100 patients, and nothing else; the autoencoder as well.
#
# TODO: record from benchmarks/segmentation.py --protocol low-data

# %% [markdown]
# ## 10. Where it fails
#
# Take the frames with the lowest Dice of an arm. The paper sorts its failures into three kinds, which can be turned into a rule:
#
# | kind | rule |
# |---|---|
# | a: everything is cavity | the read cavity covers more than half of the given atrium |
# | b: the atrium merges into the ventricle | part of the atrium is read as cavity or myocardium, more than a quarter of it |
# | c: something else draws the atrium away | the read atrium's centre lies outside of the given atrium |
# | none of these | |

# %%
def kind_of_failure(read, truth):
    """The paper's kind of failure of one frame's reading: "a", "b", "c" or ""."""
    atrium, cavity = truth == camus.LABELS["LA"], read == camus.LABELS["LV cavity"]
    if not atrium.any():
        return ""
    taken = (cavity & atrium).sum() / atrium.sum()
    merged = ((cavity | (read == camus.LABELS["myocardium"])) & atrium).sum() / atrium.sum()
    if taken > 0.5:
        return "a"
    if merged > 0.25:
        return "b"
    found = torch.nonzero(read == camus.LABELS["LA"]).float()
    if len(found):
        row, column = found.mean(0).round().long().tolist()
        if not atrium[row, column]:
            return "c"
    return ""
