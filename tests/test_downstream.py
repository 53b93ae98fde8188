"""Segmenters and classifiers are scored frame by frame, with and without synthetic frames, on patients apart."""

import shutil

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from sklearn import metrics as sklearn_metrics
from torchmetrics.functional.segmentation import hausdorff_distance

from diffecho_utils import (
    DiffEchoError,
    assets,
    camus,
    checkpoints,
    downstream,
    models,
    phantom,
    results,
    runs,
    synthetic,
)
from diffecho_utils.__main__ import main


@pytest.fixture(scope="module")
def copies(frames, as_set, tmp_path_factory):
    """Every frame of the phantom twice, as if it had been drawn, on disk."""
    return as_set(tmp_path_factory.mktemp("sets") / "copies", np.arange(len(frames)).repeat(2))


def test_a_set_becomes_frames_and_joins_the_real_ones(frames, copies):
    drawn = synthetic.read_frames(copies, frames.side)
    assert torch.equal(drawn.masks, frames.masks.repeat_interleave(2, 0))
    both = downstream.with_synthetic(frames, drawn, 0.5)
    counts = np.bincount(both.classes)
    assert (counts == np.round(1.5 * np.bincount(frames.classes))).all()
    assert torch.equal(both.images[: len(frames)], frames.images)
    assert torch.equal(both.masks[: len(frames)], frames.masks)
    assert both.table["patient"][: len(frames)].tolist() == frames.table["patient"].tolist()
    assert set(both.table["patient"][len(frames) :]).isdisjoint(frames.table["patient"])
    again, other = (downstream.with_synthetic(frames, drawn, 0.5, seed=s) for s in (0, 1))
    assert torch.equal(both.images, again.images) and not torch.equal(both.images, other.images)
    with pytest.raises(DiffEchoError, match="synthetic images of 2CH-ED, 30 are needed"):
        downstream.with_synthetic(frames, drawn, 3)


def test_hausdorff_distance_is_that_of_torchmetrics_where_nothing_is_cut_off(frames):
    """Shifted outlines: the 95th percentile is the shift, which torchmetrics' maximum confirms."""
    truth = frames.masks[:4]
    moved = truth.roll(3, dims=2)
    found = downstream.hausdorff(moved, truth)
    assert found.shape == (4, 3) and np.nanmax(found) <= 3 and np.nanmin(found) > 0
    largest = hausdorff_distance(moved.long(), truth.long(), num_classes=4, input_format="index")
    assert np.nanmax(found) <= largest.max() + 1e-6
    assert np.isnan(downstream.hausdorff(torch.zeros_like(truth), truth)).all()
    assert (downstream.hausdorff(truth, truth) == 0).all()


def test_dice_and_errors_of_the_atrium_by_hand():
    truth = torch.zeros(3, 8, 8, dtype=torch.uint8)
    truth[:2, 4:, :4] = 3  # 16 pixels; the third frame has none
    read = truth.clone()
    read[0, 4:6, :4] = 1  # half of it read as cavity,
    read[0, 6, :4] = 2  # a quarter as myocardium
    read[1, 4:, 4:] = 3  # and as much again beside it
    found = downstream.atrium_errors(read, truth)
    np.testing.assert_allclose(found[:2], [[0.5, 0.75, 0], [0, 0, 0.5]])
    assert np.isnan(found[2]).all()
    nan = np.nan
    expected = [[0, 0, 0.4], [nan, nan, 2 / 3], [nan, nan, nan]]
    np.testing.assert_allclose(downstream.dice(read, truth), expected, rtol=1e-6)


def test_paper_segmenter_has_the_papers_size():
    assert models.count_parameters(models.build_paper_segmenter(256)) == 664_282
    network = models.build_paper_segmenter(64)
    assert network(torch.randn(2, 1, 64, 64)).shape == (2, 4, 64, 64)


@pytest.mark.parametrize("recipe", ["tuned", "paper"])
def test_a_run_scores_every_test_frame_and_its_curve_ends_where_the_run_ends(frames, smoke, recipe):
    run, again = (
        downstream.segmentation_run(
            frames, frames, smoke, seed=1, recipe=recipe, steps=6, points=points, say=str
        )
        for points in (3, 1)
    )
    assert [row[0] for row in run["curve"]] == [2, 4, 6] and run["frames"] == len(frames)
    np.testing.assert_allclose(run["curve"][-1][1:], np.nanmean(run["dice"], 0), atol=2e-4)
    assert np.shape(run["dice"]) == np.shape(run["hd95"]) == (len(frames), 3)
    assert set(run["ef"]) == set(frames.table["patient"])
    np.testing.assert_array_equal(run["dice"], again["dice"])  # looking on changes nothing
    with pytest.raises(DiffEchoError, match="no recipe 'raw'; choose one of tuned, paper"):
        downstream.segmentation_run(frames, frames, smoke, recipe="raw")


@pytest.mark.parametrize(
    ("network", "settings"),
    [("resnet18", {}), ("small", {"side": 32, "recipe": {"batch": 2}})],
)
def test_a_classification_run_scores_every_test_frame(frames, smoke, network, settings):
    few = frames.where(np.arange(len(frames)) < 8)
    run = downstream.classification_run(
        few, few, smoke, network=network, steps=2, points=2, say=str, **settings
    )
    assert np.shape(run["probabilities"]) == (8, 4) and run["curve"][-1][0] == 2
    np.testing.assert_allclose(np.sum(run["probabilities"], 1), 1, atol=1e-3)
    assert run["curve"][-1][1] == pytest.approx(run["scores"]["class"]["accuracy"], abs=1e-4)
    assert run["network"] == network and [len(row) for row in run["curve"]] == [4, 4]
    built = downstream.classification_network(network, smoke)
    assert run["parameters"] == models.count_parameters(built)
    if settings:
        assert run["side"] == 32 and run["batch"] == 2


def test_classifiers_freeze_and_keep_their_statistics(smoke):
    network = downstream.classification_network("resnet18", smoke)
    network.freeze_all_but(2000)
    left = [w.numel() for w in network.parameters() if w.requires_grad]
    assert 2000 <= sum(left) < models.count_parameters(network) / 4
    layers = downstream.classification_network("efficientnet-b0", smoke).modules()
    assert {x.momentum for x in layers if isinstance(x, torch.nn.BatchNorm2d)} == {0.1}


def run_of(dice, patients, arm="real", seed=0):
    """A segmentation run with these scores."""
    return {
        "version": downstream.RUN_VERSION,
        "task": "segmentation",
        "arm": arm,
        "seed": seed,
        "steps": 30,
        "patient": patients,
        "class": [0] * len(dice),
        "dice": [[d] * 3 for d in dice],
        "hd95": [[1.0, 2.0, np.nan]] * len(dice),
        "ef": {"a": (50.0, 45.0), "b": (60.0, np.nan)},
        "curve": [[10, 0.2, 0.2, 0.2], [20, 0.6, 0.6, 0.6], [30, 0.5, 0.5, 0.5]],
    }


def answers_of(probabilities, patients, classes, seed=0):
    """A classification run with these answers."""
    return {
        "task": "classification",
        "arm": "real",
        "seed": seed,
        "steps": 30,
        "patient": patients,
        "class": classes,
        "probabilities": probabilities,
        "scores": downstream.classification_scores(np.array(probabilities), np.array(classes)),
        "curve": [[10, 0.4, 0.9, 0.5], [20, 0.6, 0.9, 0.7]],
    }


def test_summary_is_over_runs_and_differences_are_paired():
    patients = ["a", "a", "b", "b"]
    real = [run_of([0.5, 0.6, 0.7, 0.8], patients, seed=s) for s in range(2)]
    mixed = np.array([0.5, 0.6, 0.7, 0.8]) + 0.1
    more = [run_of(mixed, patients, "more", seed=s) for s in range(2)]
    table = runs.summary(real + more)
    assert table.loc["real", "Dice, LA"] == pytest.approx(0.65) and table.loc["more", "runs"] == 2
    assert table.loc["real", "Dice, LA_sd"] == 0 and table.loc["real", "ef_error"] == 5
    assert table.loc["real", "ef_measured"] == 0.5
    gap = runs.paired_difference(more, real)
    np.testing.assert_allclose(gap, 0.1)  # the patients differ by far more than the arms
    lost = [run | {"dice": [[np.nan] * 3, *run["dice"][1:]]} for run in more]
    np.testing.assert_allclose(runs.paired_difference(lost, real)[:, 0], 0.8 - 0.65)
    with pytest.raises(DiffEchoError, match="different frames"):
        runs.paired_difference(more, [run_of([0.5], ["a"])])


def many_runs(shift, seeds, shared, seed=0):
    """Runs whose weights' luck, by seed, is `shared` (dict) and as large as the patients' differences."""
    rng = np.random.default_rng(seed)
    owners = [f"p{i // 2}" for i in range(40)]
    dice = 0.5 + 0.05 * np.repeat(np.random.default_rng(9).normal(size=20), 2)
    return [
        run_of(dice + shift + shared[s] + 0.01 * rng.normal(size=40), owners, seed=s) for s in seeds
    ]


def test_runs_are_paired_by_their_seeds():
    luck = {s: 0.1 * (-1) ** s for s in range(8)}
    real, more = (many_runs(shift, range(4), luck, i) for i, shift in enumerate((0, 0.05)))
    others = many_runs(0.05, range(4, 8), luck, 1)
    paired, apart = (runs.paired_difference(arm, real)[0] for arm in (more, others))
    assert paired[0] == pytest.approx(0.05, abs=0.01) and paired[1] > 0.03
    assert np.ptp(apart[1:]) > 5 * np.ptp(paired[1:])
    backwards = runs.paired_difference(more[::-1], real)[0]
    np.testing.assert_allclose(backwards, paired)


def test_networks_are_strata():
    """That one network is far better than another is no doubt about the difference of the arms."""
    patients, classes = [f"p{i}" for i in range(40)], [i % 4 for i in range(40)]
    rng, pairs = np.random.default_rng(3), []
    for skill in (0.2, 0.9):
        arms = []
        for _ in range(2):
            right = rng.random((3, 40)) < skill
            said = [np.eye(4)[np.where(r, classes, (np.array(classes) + 1) % 4)] for r in right]
            arms.append([answers_of(x.tolist(), patients, classes, s) for s, x in enumerate(said)])
        pairs.append(arms)
    found = runs.stratified_difference(pairs)
    each = [runs.classification_difference(*pair) for pair in pairs]
    assert found[0] == pytest.approx(np.mean([value for value, _, _ in each]))
    assert np.ptp(found[1:]) < 0.5


def test_steps_saved_are_of_pairs():
    runs_of = lambda factor: [  # noqa: E731
        run_of([0.5], ["a"], seed=s)
        | {"curve": [[10 * f, *[0.4] * 3], [20 * f, *[0.8] * 3]], "steps": 60}
        for s, f in enumerate(np.array([1, 1.5, 3]) * factor)
    ]
    value, low, high = runs.steps_saved([(runs_of(0.5), runs_of(1))])
    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5))  # slow seeds are slow in both
    with pytest.raises(DiffEchoError, match="run both with the same"):
        runs.steps_saved([(runs_of(0.5)[:2], runs_of(1))])


def test_steps_to_a_threshold_are_read_between_the_points():
    run = run_of([0.5], ["a"])
    assert runs.steps_to(run, 0.4) == pytest.approx(15)
    assert runs.steps_to(run, 0.1) == 10 and runs.steps_to(run, 0.9) == np.inf
    run = answers_of(np.eye(4).tolist(), list("aabb"), [0, 1, 2, 3])
    assert runs.steps_to(run, 0.5, "class") == pytest.approx(15)
    assert runs.steps_to(run, 0.9, "view") == 10 and runs.steps_to(run, 0.8, "phase") == np.inf


def test_runs_of_another_version_are_named_and_left_out(tmp_path):
    facts = {"world": "phantom", "profile": "smoke", "command": "x"}
    values, folder = run_of([0.5], ["a"]), tmp_path / "runs"
    results.save(folder, "mine", values, **facts)
    both = {"version": downstream.RUN_VERSION, "runs": [values, values | {"seed": 7}]}
    results.save(folder, "two", both, **facts)
    results.save(folder, "old", values | {"version": 0}, **facts)
    (folder / "broken.json").write_text("{")
    packed, again = (results.pack(folder, tmp_path / name) for name in ("runs.zip", "again.zip"))
    assert again.read_bytes() == packed.read_bytes()
    for source in (folder, packed):
        found, skipped = runs.read(source)
        assert [run["seed"] for run in found] == [0, 0, 7] and len(skipped) == 2
        assert found[0]["record"]["name"] == "mine"
        assert "phantom, profile smoke, " in runs.made(found) and "`x`" in runs.made(found)
        assert any("old.json: version 0" in line for line in skipped)
        assert any("broken.json" in line for line in skipped)
    bent = bytearray(packed.read_bytes())
    bent[bent.index(b"BZh") + 20] ^= 255
    for damaged in (bent, packed.read_bytes()[:-30]):
        again.write_bytes(damaged)
        with pytest.raises(DiffEchoError, match="damaged"):
            runs.read(again)
    with pytest.raises(DiffEchoError, match="no such runs"):
        runs.read(tmp_path / "nothing")
    with pytest.raises(DiffEchoError, match="no record"):
        results.pack(tmp_path / "nothing", tmp_path / "x.zip")


def test_runs_know_the_generators_that_have_been_trained_further_since():
    shipped = checkpoints.load_generator(assets.checkpoint("camus", "sdm"))
    by = [{"model": "sdm", "generator": synthetic.digest(shipped)}]
    by += [{"model": "text", "generator": "0" * 16}, None]
    found = [{"synthetic": made} for made in by]
    assert runs.outdated(found).startswith("*The frames of text were drawn by earlier checkpoints")
    assert runs.outdated(found[:1]) == ""


def test_seeds_as_a_mean_with_its_ends_and_intervals_in_words():
    arms = {"real": [{"x": 0.5}, {"x": 0.9}, {"x": 0.7}], "alone": [{"x": 0.2}]}
    found = runs.over_seeds(arms, ["real", "alone"], lambda run: run["x"])
    assert found["real"] == pytest.approx((0.7, 0.5, 0.9)) and found["alone"] == (0.2, 0.2, 0.2)
    intervals = (0.1, 0.02, 0.2), (-0.1, -0.2, -0.02), (0.1, -0.1, 0.3), (0.1, 0.0, 0.2)
    words = [runs.told_apart(interval) for interval in intervals]
    assert words == ["better", "worse", "not told apart", "not told apart"]


def test_patients_on_both_sides_and_missing_classes_are_refused(phantom_root):
    table = camus.read_table(phantom_root)
    training, validation = (camus.select(table, split) for split in ("training", "validation"))
    downstream.check_apart(training, validation)
    with pytest.raises(DiffEchoError, match="are in the training and in the test frames"):
        downstream.check_apart(training, training)
    with pytest.raises(DiffEchoError, match="no test frame of 4CH-ED, 4CH-ES"):
        downstream.check_apart(training, validation[validation["view"] == "2CH"])


def test_command_line_trains_with_a_set_and_refuses_one_without_maps(
    phantom_root, copies, tmp_path, capsys
):
    command = ["downstream", "segmentation", "--data", str(phantom_root), "--profile", "smoke"]
    path = tmp_path / "runs.json"
    arms = ["--synthetic", str(copies), "--share", "0.5", "--seeds", "2", "--json", str(path)]
    assert main([*command, *arms, "--steps", "2"]) == 0
    values = results.load(path)["values"]
    assert values["arm"] == "real + 0.5 copies" and [r["seed"] for r in values["runs"]] == [0, 1]
    assert "real + 0.5 copies" in capsys.readouterr().out
    assert [run["arm"] for run in runs.read(tmp_path)[0]] == ["real + 0.5 copies"] * 2
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "images").symlink_to(copies / "images")
    synthetic.read(copies, 64)[1].assign(label_map="").to_csv(bare / "metadata.csv", index=False)
    for options, message in (
        (["--synthetic-only"], "name one with --synthetic"),
        (["--patients", "100"], "100 were asked for"),
        (["--synthetic", str(bare)], "have no label map and cannot teach a segmenter"),
    ):
        assert main([*command, *options]) == 1
        assert message in capsys.readouterr().err
    task = ["downstream", "classification", *command[2:], "--synthetic", str(bare), "--steps", "2"]
    assert main([*task, "--synthetic-only", "--no-augmentation"]) == 0
    assert "class, accuracy" in capsys.readouterr().out


def test_tested_in_another_folder(phantom_root, tmp_path, capsys):
    """There a name that is known is another patient, unless the pictures are the same."""
    command = ["downstream", "segmentation", "--profile", "smoke", "--steps", "2"]
    command += ["--data", str(phantom_root), "--test-split", "training", "--test-data"]
    other = phantom.write(tmp_path / "other", patients=10, seed=99)
    assert main([*command, str(other)]) == 0
    copy = shutil.copytree(phantom_root, tmp_path / "copy")
    assert main([*command, str(copy)]) == 1
    assert "are in the training and in the test frames" in capsys.readouterr().err


def test_a_fold_has_its_own_patients(phantom_root, tmp_path):
    command = ["downstream", "segmentation", "--profile", "smoke", "--steps", "2", "--fold", "3"]
    path = tmp_path / "runs.json"
    command += ["--data", str(phantom_root), "--test-split", "testing", "--json", str(path)]
    assert main(command) == 0
    (run,) = results.load(path)["values"]["runs"]
    fold = camus.by_fold(camus.read_table(phantom_root), 3)
    assert set(run["patient"]) == set(camus.select(fold, "testing")["patient"])
    assert main([*command, "--fold", "11"]) == 2


def test_classification_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.ones(4), 60)
    truth = np.where(rng.random(60) < 0.6, chances.argmax(1), rng.integers(4, size=60))
    found = downstream.classification_scores(torch.from_numpy(chances), torch.from_numpy(truth))
    for name, seen, answer in (
        ("class", chances.argmax(1), truth),
        ("view", chances.reshape(-1, 2, 2).sum(2).argmax(1), truth // 2),
        ("phase", chances.reshape(-1, 2, 2).sum(1).argmax(1), truth % 2),
    ):
        scores = sklearn_metrics.precision_recall_fscore_support(answer, seen, average="macro")
        expected = dict(zip(("precision", "recall", "f1"), scores, strict=False))
        expected["accuracy"] = sklearn_metrics.accuracy_score(answer, seen)
        for score, value in expected.items():
            assert found[name][score] == pytest.approx(value, abs=1e-6), (name, score)
        assert 0 < found[name]["calibration_error"] < 1


def test_sums_of_probabilities_are_never_taken_for_logits():
    third = np.float32([[0.6, 0.4000001, 0, 0], [0, 0, 0.3, 0.7000001]])
    pair = torch.from_numpy(third), torch.tensor([1, 3])
    view, truth = downstream.classification_questions(*pair)["view"]
    assert view.max() <= 1 and truth.tolist() == [0, 1]
    found = downstream.classification_scores(*pair)
    assert found["view"]["calibration_error"] == pytest.approx(0, abs=1e-6)


def test_confusion_and_difference_of_classifiers_by_hand():
    patients, classes = ["b", "b", "a", "a"], [0, 1, 2, 3]
    good = np.eye(4)[[0, 1, 2, 2]].tolist()  # only the phase of the last is wrong
    poor = np.eye(4)[[0, 1, 0, 0]].tolist()  # nothing of patient a but one phase
    both = [answers_of(p, patients, classes) for p in (good, poor)]
    counts = runs.classification_confusion(both[0])
    assert counts.shape == (2, 4, 4) and counts[0, 3, 2] == counts[1, 0, 0] == 1
    phase = runs.classification_confusion(both[0], "phase").sum(0)
    np.testing.assert_array_equal(phase, [[2, 0], [1, 1]])
    pair = [both[0]], [both[1]]
    value, low, high = runs.classification_difference(*pair)
    assert value == 0.25 and (low + high) / 2 == pytest.approx(0.25)  # patient b 0, a 0.5
    assert high - value == pytest.approx(scipy_stats.t.ppf(0.975, 1) * 0.25)
    assert runs.classification_difference(*pair, "view")[0] == 0.5
    f1, low, high = runs.classification_difference(*pair, score="f1")
    gap = both[0]["scores"]["class"]["f1"] - both[1]["scores"]["class"]["f1"]
    assert f1 == pytest.approx(gap, abs=1e-6) and low <= f1 <= high
    with pytest.raises(DiffEchoError, match="different frames"):
        runs.classification_difference([both[0]], [answers_of(good, ["c"] * 4, classes)])


def test_reliability_sums_up_to_the_calibration_error():
    rng = np.random.default_rng(1)
    chances, truth = rng.dirichlet(np.ones(4), 300), rng.integers(4, size=300)
    found = runs.classification_reliability(chances, truth)
    assert found["frames"].sum() == 300
    gap = (found["frames"] * (found["certainty"] - found["accuracy"]).abs()).sum() / 300
    expected = downstream.classification_scores(chances, truth)["class"]["calibration_error"]
    assert gap == pytest.approx(expected, abs=1e-6)
