"""The words for a frame: what a text encoder reads.

Chapters 01 and 04. A prompt is made from a row of a frames table: from its view and phase always,
from image quality, ejection fraction (EF) and the left atrium's size where the table has them.
"""

import itertools
import re
import string
from functools import lru_cache

import numpy as np
import pandas as pd

from diffecho_utils import DiffEchoError, anatomy

WORDINGS = 3  # ways to say the same, so that a text model cannot memorise one string

# EF classes of the universal definition of heart failure (Bozkurt et al. 2021), in whole per cent.
EF_CLASSES = {"reduced": (0, 40), "mildly reduced": (41, 49), "normal": (50, 100)}

# The atrium's area at ES over the ventricle's at ED, mean of the views: 20th and 80th percentile of
# the 400 training patients of CAMUS. A ratio needs no pixel spacing, which many re-packs lost, and
# survives stretching. It is unrelated to the EF (correlation 0.01 there), but no clinical grade:
# that is a volume over body surface.
LA_SMALL, LA_ENLARGED = 0.385, 0.750

_PAPER = (
    ("An ultrasound image shows the heart in a {view} view during the {phase} phase.", {}),
    ("The heart during the {phase} phase, {view} view, ultrasound image.", {}),
    ("This {view} view of the heart is an ultrasound image in the {phase} phase.", {}),
)
# Of each wording the sentence, and what is added to it for each of these facts that is known.
_WORDINGS = {
    "paper": _PAPER,
    "paper-seg": (
        ("an ultrasound image of heart in {view} view", {}),
        ("{view} view of the heart, an ultrasound image", {}),
        ("an ultrasound image shows the heart in {view} view", {}),
    ),
    "random": _PAPER,
    "clinical": (
        (
            "apical {view} view at {moment}",
            {
                "quality": "{} image quality",
                "ef": "{} ejection fraction",
                "la_size": "{} left atrium",
            },
        ),
        (
            "echocardiogram at {moment} in the apical {view} view",
            {
                "quality": "the image quality is {}",
                "ef": "the ejection fraction is {}",
                "la_size": "the left atrium is {}",
            },
        ),
        (
            "{moment}, {view} echocardiogram",
            {"quality": "quality {}", "la_size": "left atrium {}", "ef": "ejection fraction {}"},
        ),
    ),
}
TEMPLATES = tuple(_WORDINGS)
_VIEW = {"2CH": "two-chamber", "4CH": "four-chamber"}
_MOMENT = {"ED": "end-diastole", "ES": "end-systole"}
_SWAPS = (tuple(_VIEW.values()), tuple(_MOMENT.values()), ("ed phase", "es phase"))
_QUALITY = ("Good", "Medium", "Poor")
_LA_SIZES = ("small", "normal", "enlarged")


def make(table, template="clinical", wording=0, seed=0):
    """One prompt a row of `table` (columns view, phase; quality, ef, la_size where known): list of str.

    template, in the words of DiffEcho's public code (wording 0; the other two say the same):

    - "paper": the text-guided model's, with view and phase;
    - "paper-seg": the text + segmentation guided model's, with the view alone;
    - "random": "paper" with each keyword (two-chamber, four-chamber, ed, es) replaced by six random
      letters of its own, drawn from `seed`: the classes stay apart, what the words mean is gone. The
      code has such an option; that a keyword keeps its string for a whole run is our reading;
    - "clinical": ours, with all facts; one that is missing is left out.

    Raises DiffEchoError for an unknown template or wording.
    """
    if template not in TEMPLATES or wording not in range(WORDINGS):
        raise DiffEchoError(
            f"no prompt template {template!r} with wording {wording!r}; templates are {TEMPLATES}, "
            f"wordings 0 to {WORDINGS - 1}"
        )
    (sentence, additions), prompts = _WORDINGS[template][wording], []
    keywords = _random_strings(seed) if template == "random" else {}
    for row in table.to_dict("records"):
        view, phase = _VIEW[row["view"]], row["phase"].lower()
        shown = {"view": keywords.get(view, view), "phase": keywords.get(phase, phase)}
        clauses = [sentence.format(**shown, moment=_MOMENT[row["phase"]])]
        known = row | {"ef": ef_class(row.get("ef"))}
        for fact, text in additions.items():
            value = known.get(fact)
            if isinstance(value, str) and value:  # where it is missing: NaN, None or ""
                clauses.append(text.format(value.lower()))
        prompts.append(", ".join(clauses))
    return prompts


def opposite(prompt):
    """The sentence of the other view at the other moment; what names neither stays as it is."""
    swapped = [(name, other) for pair in _SWAPS for name, other in (pair, pair[::-1])]
    return re.sub("|".join(name for name, _ in swapped), lambda m: dict(swapped)[m[0]], prompt)


def wordings(table, template="clinical", seed=0):
    """Every wording of every row: data frame patient, view, phase, wording, prompt; `WORDINGS` rows a frame."""
    keys = table[["patient", "view", "phase"]].reset_index(drop=True)
    parts = [
        keys.assign(wording=wording, prompt=make(table, template, wording, seed))
        for wording in range(WORDINGS)
    ]
    return pd.concat(parts).sort_index(kind="stable", ignore_index=True)


def facts(masks, table):
    """The table with what its label maps (N, H, W) can tell: columns ef, la_size.

    ef: per cent, the folder's own where it has one, else `anatomy.patients_ef`. la_size: "small",
    "normal", "enlarged" by `LA_SMALL` and `LA_ENLARGED`. Both are a patient's, the same in all of
    its frames; missing where the frames that they need are not in the table, or lack the chamber.
    """
    masks, table = np.asarray(masks), table.assign(ef=table["ef"].astype(float))
    table["ef"] = table.groupby("patient")["ef"].transform("first")
    unknown = table["ef"].isna().to_numpy()
    measured = anatomy.patients_ef(masks[unknown], table[unknown]).set_index("patient")["ef"]
    table["ef"] = table["ef"].fillna(table["patient"].map(measured))
    bounds = (-np.inf, LA_SMALL, LA_ENLARGED, np.inf)
    size = pd.cut(la_ratio(masks, table), bounds, labels=_LA_SIZES)
    table["la_size"] = table["patient"].map(size.astype(object))
    return table


def la_ratio(masks, table):
    """Area of the left atrium at ES over that of the LV cavity at ED: a Series by patient.

    Mean of the views that show both.
    """
    pixel = table[["lateral_mm", "depth_mm"]].prod(axis=1, skipna=False).fillna(1.0)
    areas = anatomy.areas(masks) * pixel.to_numpy()[:, None]
    areas[areas == 0] = np.nan  # a label map without the chamber does not make it small
    found = table.assign(cavity=areas[:, 0], atrium=areas[:, 2]).set_index(["patient", "view"])
    atrium = found.loc[found["phase"] == "ES", "atrium"]
    cavity = found.loc[found["phase"] == "ED", "cavity"]
    return (atrium / cavity).groupby("patient").mean().dropna()


def ef_class(ef):
    """The class in `EF_CLASSES` of an EF in per cent, rounded to a whole number; "" where missing."""
    if pd.isna(ef):
        return ""
    return next(name for name, (_, highest) in EF_CLASSES.items() if round(ef) <= highest)


@lru_cache
def every(seed=0):
    """All prompts that the templates can produce, each once: tuple of str. What a tokenizer learns from."""
    efs = [highest for _, highest in EF_CLASSES.values()]
    values = itertools.product(_VIEW, _MOMENT, (None, *_QUALITY), (None, *efs), (None, *_LA_SIZES))
    table = pd.DataFrame(values, columns=["view", "phase", "quality", "ef", "la_size"])
    texts = {}  # a dict keeps their order
    for template, wording in itertools.product(TEMPLATES, range(WORDINGS)):
        texts |= dict.fromkeys(make(table, template, wording, seed))
    return tuple(texts)


def words(text):
    """The words of a prompt, in lower case, without punctuation: list of str."""
    return re.findall(r"[\w-]+", text.lower())


def vocabulary(seed=0):
    """Every word that the templates can produce: sorted list of str."""
    return sorted({word for text in every(seed) for word in words(text)})


def check(text, seed=0):
    """The prompt `text` itself; raises DiffEchoError naming its words that no template uses."""
    known = vocabulary(seed)
    unknown = sorted(set(words(text)) - set(known))
    if unknown or not words(text):
        problem = f"unknown words {unknown}" if unknown else "no words"
        raise DiffEchoError(f"prompt {text!r}: {problem}; use those known: {', '.join(known)}")
    return text


def _random_strings(seed):
    """{keyword: six random letters}."""
    letters = np.array(list(string.ascii_lowercase))
    rng = np.random.default_rng(seed)
    keywords = [*_VIEW.values(), *map(str.lower, _MOMENT)]
    return {keyword: "".join(rng.choice(letters, 6)) for keyword in keywords}
