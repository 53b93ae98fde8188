"""Prompts: the paper's own words, missing facts left out, sizes of the atrium, unknown words refused."""

import numpy as np
import pandas as pd
import pytest

from diffecho_utils import DiffEchoError, assets, camus, data, phantom, profiles, prompts
from diffecho_utils.__main__ import main


@pytest.fixture
def rows():
    """A frame about which all is known, and one of which only view and phase are."""
    return pd.DataFrame(
        {
            "view": ["2CH", "4CH"],
            "phase": ["ED", "ES"],
            "quality": ["Good", None],
            "ef": [45.4, np.nan],
            "la_size": ["enlarged", np.nan],
        }
    )


def test_wording_0_is_the_paper_s_own(rows):
    assert prompts.make(rows, "paper") == [
        "An ultrasound image shows the heart in a two-chamber view during the ed phase.",
        "An ultrasound image shows the heart in a four-chamber view during the es phase.",
    ]
    assert prompts.make(rows, "paper-seg")[0] == "an ultrasound image of heart in two-chamber view"


def test_missing_facts_are_left_out(rows):
    full, bare = prompts.make(rows, "clinical")
    assert full == (
        "apical two-chamber view at end-diastole, good image quality, "
        "mildly reduced ejection fraction, enlarged left atrium"
    )
    assert bare == "apical four-chamber view at end-systole"
    assert prompts.make(rows[["view", "phase"]], "clinical")[1] == bare


@pytest.mark.parametrize("template", prompts.TEMPLATES)
@pytest.mark.parametrize("wording", range(prompts.WORDINGS))
def test_the_opposite_is_what_the_other_view_and_moment_would_be_told(rows, template, wording):
    swaps = {"view": {"2CH": "4CH", "4CH": "2CH"}, "phase": {"ED": "ES", "ES": "ED"}}
    said = prompts.make(rows, template, wording)
    other = prompts.make(rows.replace(swaps), template, wording)
    wanted = said if template == "random" else other  # its words mean nothing
    assert list(map(prompts.opposite, said)) == wanted


@pytest.mark.parametrize("template", prompts.TEMPLATES)
def test_every_wording_says_it_differently_in_known_words(rows, template):
    ways = [prompts.make(rows, template, wording) for wording in range(prompts.WORDINGS)]
    for texts in zip(*ways, strict=True):
        assert len(set(texts)) == prompts.WORDINGS
        assert not any("{" in text or "  " in text for text in texts)
        assert all(prompts.check(text) == text and text in prompts.every() for text in texts)
    assert len(set(prompts.every())) == len(prompts.every())


def test_random_strings_keep_the_classes_apart_and_nothing_else():
    table = pd.DataFrame(camus.CLASSES, columns=["view", "phase"])
    texts = prompts.make(table, "random", seed=3)
    assert len(set(texts)) == 4 and texts == prompts.make(table, "random", seed=3)
    assert set(texts).isdisjoint(prompts.make(table, "random", seed=4))
    plain = prompts.make(table, "paper")
    for text, paper in zip(texts, plain, strict=True):
        changed = set(prompts.words(text)) ^ set(prompts.words(paper))
        assert len(changed) == 4 and "chamber" not in text
        assert all(len(word) == 6 for word in set(prompts.words(text)) & changed)


def test_ef_classes_at_their_borders():
    values = (18, 40, 40.4, 41, 49.4, 50, 70, np.nan, None)
    names = ["reduced"] * 3 + ["mildly reduced"] * 2 + ["normal"] * 2 + ["", ""]
    assert [prompts.ef_class(value) for value in values] == names


def test_atrium_s_size_is_the_ratio_of_two_areas():
    """LA at ES of 20, 50 and 80 pixels beside an LV at ED of 100: small, normal, enlarged."""
    rows, masks = [], []
    for number, atrium in enumerate((20, 50, 80)):
        for view, phase in camus.CLASSES:
            rows.append(dict(patient=f"patient{number}", view=view, phase=phase, ef=50.0))
            mask = np.zeros((20, 20), np.uint8)
            mask.flat[: 100 if phase == "ED" else 60] = 1
            mask.flat[200 : 200 + (atrium if phase == "ES" else 5)] = 3
            masks.append(mask)
    table = pd.DataFrame(rows).assign(lateral_mm=np.nan, depth_mm=np.nan)
    masks = np.stack(masks)
    assert prompts.la_ratio(masks, table).tolist() == [0.2, 0.5, 0.8]
    sizes = prompts.facts(masks, table).groupby("patient")["la_size"].unique()
    assert [size.tolist() for size in sizes] == [["small"], ["normal"], ["enlarged"]]
    early = table["phase"] == "ED"
    assert prompts.facts(masks[early], table[early])["la_size"].isna().all()


def test_facts_fill_what_the_folder_does_not_say(frames):
    silent = frames.table["patient"] == frames.table["patient"].iloc[0]
    table = frames.table.assign(ef=frames.table["ef"].where(~silent))
    known = prompts.facts(frames.masks, table)
    assert known["ef"].notna().all()
    assert known["la_size"].isin(["small", "normal", "enlarged"]).all()
    pd.testing.assert_series_equal(known["ef"][~silent], frames.table["ef"][~silent])
    assert known["ef"][silent].nunique() == 1


@pytest.mark.parametrize(
    ("text", "named"), [("a kidney in two-chamber view", "kidney"), (" ,", "no words")]
)
def test_unknown_words_are_named(text, named):
    with pytest.raises(DiffEchoError, match=named):
        prompts.check(text)


def test_unknown_template_and_wording_are_refused(rows):
    for arguments in (("poem", 0), ("paper", 3), ("paper", -1)):
        with pytest.raises(DiffEchoError, match="templates are .*wordings 0 to 2"):
            prompts.make(rows, *arguments)


def test_sizes_of_the_atrium_are_the_training_patients_own(real_root):
    """The two borders are the 20th and the 80th percentile of the training patients of CAMUS."""
    table = camus.select(camus.read_table(real_root), split="training")
    frames = data.load_frames(table, data.Geometry(128))
    ratio = prompts.la_ratio(frames.masks, frames.table)
    borders = (prompts.LA_SMALL, prompts.LA_ENLARGED)
    np.testing.assert_allclose(ratio.quantile([0.2, 0.8]), borders, atol=0.001)


def test_the_command_writes_the_frozen_prompts(tmp_path):
    """`data/prompts.csv` is the default phantom's; its first patients are made again here."""
    cpu = profiles.get("cpu")
    root = phantom.write(tmp_path / "phantom", patients=4, seed=cpu.phantom_seed)
    out = tmp_path / "prompts.csv"
    assert main(["prompts", str(root), str(out)]) == 0
    lines = out.read_text().splitlines()
    frozen = (assets.root() / "data" / "prompts.csv").read_text().splitlines()
    assert frozen[: len(lines)] == lines and len(lines) == 1 + 4 * 4 * prompts.WORDINGS
    assert len(frozen) == 1 + cpu.phantom_patients * 4 * prompts.WORDINGS


def test_the_command_takes_a_template(phantom_root, tmp_path):
    out = tmp_path / "prompts.csv"
    main(["prompts", str(phantom_root), str(out), "--template", "paper-seg"])
    table = pd.read_csv(out)
    assert list(table) == ["patient", "view", "phase", "wording", "prompt"]
    assert table["prompt"].str.contains("chamber").all()
    assert table["prompt"].nunique() == 2 * prompts.WORDINGS
