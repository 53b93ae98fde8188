"""The command line: `python -m diffecho_utils COMMAND --help`. Thin over what the notebooks call."""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path

from diffecho_utils import DiffEchoError, camus, prompts

# Rows of a recipe (profiles.Recipe) that `train` can change.
_RECIPE = ("batch", "accumulation", "learning_rate", "ema", "prediction", "snr_gamma")

_SPLITS = (*camus.SPLITS, "all")  # all: every patient, listed or not

_FIGURES = (".png", ".pdf", ".svg")  # files that `evaluate` draws


def main(arguments=None):
    """Run one command; returns the exit status: 0 done, 1 bad input (said in a line), 130 interrupted."""
    arguments = list(map(str, sys.argv[1:] if arguments is None else arguments))
    options = _parser().parse_args(arguments)
    options.line = _line(arguments, options)

    def run():
        for name in ("data", "masks", "test_data"):
            if getattr(options, name, None):
                setattr(options, name, _official(getattr(options, name)))
        return options.run(options)

    return said(run)


def said(run):
    """Exit status of run(), whose errors of data and disk are said in a line."""
    try:
        return run() or 0
    except DiffEchoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"error: {reason}; free the disk or name another place to write to", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _line(arguments, options):
    """The whole command for a record, its folders and files by their names alone."""
    names = {str(value): value.name for value in vars(options).values() if isinstance(value, Path)}
    words = []
    for word in arguments:
        option, equals, value = word.partition("=")
        words.append(
            f"{option}={names[value]}" if equals and value in names else names.get(word, word)
        )
    return shlex.join(["python", "-m", "diffecho_utils", *words])


def phantom_command(options):
    from diffecho_utils import phantom

    root = phantom.write(
        options.out,
        patients=options.patients,
        seed=options.seed,
        half_sequences=options.half_sequences,
        progress=_progress("patients"),
    )
    print(f"wrote {options.patients} patients to {root}")


def check_command(options):
    problems, notes = camus.examine(
        options.root, progress=None if options.json else _progress("frames")
    )
    if options.json:

        def pairs(lines, word):
            return [dict(zip(("path", word), line.split(": ", 1), strict=True)) for line in lines]

        report = {"root": str(options.root), "usable": not problems}
        report |= {"problems": pairs(problems, "problem"), "notes": pairs(notes, "note")}
        print(json.dumps(report, indent=1))
        return int(bool(problems))
    for line in [*problems, *(f"note: {note}" for note in notes)]:
        print(line)
    if problems:
        print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {options.root}")
        return 1
    table = camus.read_table(options.root)
    splits = table.groupby("split", dropna=False).patient.nunique().to_dict()
    print(f"{options.root}: {len(table)} frames of {table.patient.nunique()} patients, all usable")
    print("patients in each split: " + ", ".join(f"{k or 'none'} {n}" for k, n in splits.items()))
    return 0


def convert_command(options):
    from diffecho_utils import releases

    release = releases.convert(options.source, options.dest, progress=_progress("patients"))
    print(f"wrote {len(release.pictures)} patients, from form {release.form}, to {options.dest}")
    for note in release.notes:
        print(f"note: {note}")


def download_command(options):
    from diffecho_utils import download

    if options.accept_licence:
        print(f"{download.LICENCE}\nAccepted.", flush=True)
    root = download.download(
        options.dest,
        accept_licence=options.accept_licence,
        urls=options.url or download.URLS,
        patients=options.patients,
        restart=options.restart,
        progress=lambda done, total, unit: _progress(unit)(done, "?" if total is None else total),
    )
    print(f"wrote CAMUS, {options.patients} patients, to {root}")


def prompts_command(options):
    from diffecho_utils import data, files, profiles

    frames = data.load_frames(camus.read_table(options.root), profiles.get("cpu"))
    table = prompts.wordings(prompts.facts(frames), options.template)
    files.write_text(options.out, table.to_csv(index=False, lineterminator="\n"))
    print(f"wrote {prompts.WORDINGS} prompts for each of {len(frames)} frames to {options.out}")


def train_command(options):
    from dataclasses import replace

    from diffecho_utils import assets, data, profiles, results, training

    profile = replace(profiles.get(options.profile), stretched=options.stretch)
    if options.latent_channels:
        profile = replace(profile, latent_channels=options.latent_channels)
    if options.width:
        profile = profiles.narrowed(profile, options.width)
    if options.views:
        profile = replace(profile, jittered_views=options.views)
    if options.patients:
        profile = replace(profile, patients=options.patients)
    changed = {name: getattr(options, name) for name in _RECIPE}
    profile = profiles.adapt(profile, options.model, steps=options.steps, **changed)
    table = camus.select(
        camus.read_table(options.data), split=options.split, patients=profile.patients
    )
    _enough(table, options.patients, options.split, options.data)
    missing = _missing_classes(table)
    if missing:
        print(f"note: no frames of {', '.join(missing)}: the network learns the other classes only")
    cache = assets.workspace() / "cache"
    frames = data.load_frames(table, profile, cache_dir=cache)
    needs = {
        name: getattr(options, name) or assets.checkpoint(table.attrs["world"], name)
        for name in training.builds_on(options.model, profile)
    }
    training.train(
        options.model,
        frames,
        profile,
        options.out,
        needs=needs,
        restart=options.restart,
        provenance=results.provenance(options.line),
        progress=lambda line: print(line, flush=True),
        seed=options.seed,
        cache_dir=cache,
        minutes=options.minutes,
        start=options.start,
    )
    print(f"wrote {options.out}")


def _enough(rows, wanted, split, root):
    found = rows["patient"].nunique()
    if wanted and found < wanted:
        raise DiffEchoError(
            f"{root}: {found} patients in {split}, {wanted} were asked for; ask for fewer"
        )


def _missing_classes(rows):
    there = set(camus.class_index(rows))
    return [name for index, name in enumerate(camus.CLASS_NAMES) if index not in there]


def sample_command(options):
    from diffecho_utils import assets, checkpoints, data, models, sampling, synthetic

    if options.masks and "masks" not in sampling.CONDITIONS[options.model]:
        raise DiffEchoError(f"{options.model} is told no label maps; leave --masks out")
    generator = checkpoints.load_generator(options.checkpoint)
    made = checkpoints.read_training(options.checkpoint)
    if generator.model != options.model:
        raise DiffEchoError(f"{options.checkpoint}: a checkpoint of {generator.model}")
    state = models.processes()
    generator.to(state.device)
    facts = {key: made.get(key) for key in ("world", "profile", "commit", "stretched")}
    frames, classes = None, generator.classes
    if options.masks:
        rows = camus.select(
            camus.read_table(options.masks), split=options.split, patients=options.patients
        )
        _enough(rows, options.patients, options.split, options.masks)
        frames = data.load_frames(rows, generator, cache_dir=assets.workspace() / "cache")
        classes = sorted(set(camus.class_index(rows)))
        facts |= {"masks_world": rows.attrs["world"], "masks_split": options.split}
        facts |= {"masks_patients": rows["patient"].nunique()}
    planned = synthetic.plan(options.model, options.n, frames, options.template, classes)
    table = synthetic.write(
        generator,
        options.out,
        *planned,
        options.steps,
        seed=options.seed,
        guidance=generator.guidance if options.guidance is None else options.guidance,
        guidance_interval=options.guidance_interval,
        solver=options.solver,
        facts=facts,
        progress=_progress("images") if state.is_main_process else None,
        batch=options.batch,
        restart=options.restart,
    )
    if state.is_main_process:
        names = ", ".join(camus.CLASS_NAMES[index] for index in classes)
        print(f"wrote {len(table)} images, {options.n} of each class ({names}), to {options.out}")


def evaluate_command(options):
    from diffecho_utils import (
        assets,
        checkpoints,
        data,
        downstream,
        metrics,
        models,
        plots,
        profiles,
        results,
        synthetic,
    )

    if options.figure and options.figure.suffix not in _FIGURES:
        raise DiffEchoError(f"{options.figure}: a figure ends in one of {' '.join(_FIGURES)}")
    profile = profiles.get(options.profile)
    table = camus.read_table(options.data)
    rows = [
        camus.select(table, split, patients=profile.patients)
        for split in ("training", options.split)
    ]
    images, metadata = synthetic.read(options.synthetic)
    named = {options.synthetic: metadata, "training": rows[0], options.split: rows[1]}
    for name, there in named.items():
        if missing := _missing_classes(there):
            raise DiffEchoError(
                f"{name}: no frames of {', '.join(missing)}, and the classes are compared one by one; take a "
                "folder and a set with all four (training and sampling do with fewer)"
            )
    geometry = data.Geometry(images.shape[-1], metadata.attrs["stretched"])
    reference, held_out = (
        data.load_frames(part, geometry, cache_dir=assets.workspace() / "cache") for part in rows
    )
    names = [str(options.synthetic / name) for name in metadata["file_name"]]
    metrics.check_images(images, names=names)
    maps = synthetic.read_label_maps(options.synthetic, metadata, geometry.side)
    see, classes = _features(options), camus.class_index(metadata)
    values = metrics.panel(
        see(images),
        classes,
        see(reference.images),
        reference.classes.numpy(),
        see(held_out.images),
        held_out.classes.numpy(),
        held_out.table["patient"].to_numpy(),
    )
    judges = [
        checkpoints.load_network(assets.checkpoint("camus", name)).to(models.device())
        for name in ("segmenter", "classifier")
    ]
    mine = downstream.read_by_judges(judges, images, classes, maps)
    truth = None if maps is None else held_out.masks
    real = downstream.read_by_judges(judges, held_out.images, held_out.classes.numpy(), truth)
    for score in mine:
        values[score], values[f"{score}_floor"] = mine[score], real[score]
    title = f"{options.synthetic.name}: {len(images)} images, features of the {options.features}"
    print(f"{title}; floor: {options.split} frames of {options.data.name}")
    print(values.T.to_string(float_format="{:.3f}".format, na_rep="-"))
    if values["precision"].isna().any():
        few = values.index[values["precision"].isna()]
        print(f"{', '.join(few)}: fewer than the 6 images that precision and its like need")
    if options.json:
        results.save(
            options.json.parent,
            options.json.stem,
            values.to_dict("index"),
            world=table.attrs["world"],
            profile=profile.name,
            split=options.split,
            command=options.line,
        )
    if options.figure:
        figure = plots.panel(values)
        figure.suptitle(title)
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.figure, dpi=150)
        print(f"wrote {options.figure}")


def _features(options):
    """Images to features, by the network that `evaluate --features` names."""
    from diffecho_utils import assets, checkpoints, data, metrics, models

    if options.features == "inception":
        inception = metrics.load_inception(options.inception).to(models.device())
        return lambda images: metrics.inception_features(inception, images)
    folder = assets.checkpoint("camus", options.features)
    if options.features == "classifier":
        classifier = checkpoints.load_network(folder).to(models.device())
        return lambda images: metrics.network_features(classifier, images)
    if options.features == "clip":
        clip = checkpoints.load_clip(folder)[0].to(models.device())
        return lambda images: metrics.clip_features(clip, images)
    folder = options.autoencoder or folder
    side = checkpoints.read_training(folder)["side"]
    vae = checkpoints.load_autoencoder(folder).to(models.device())
    return lambda images: metrics.features(vae, data.resized(images, side))


def downstream_command(options):
    from diffecho_utils import assets, data, downstream, profiles, results, runs, synthetic

    if options.synthetic_only and not options.synthetic:
        raise DiffEchoError("--synthetic-only trains on a set; name one with --synthetic DIR")
    profile = profiles.get(options.profile)
    table, cache = camus.read_table(options.data), assets.workspace() / "cache"
    tests = camus.read_table(options.test_data) if options.test_data else table
    rows = camus.select(table, options.train_split, patients=options.patients or profile.patients)
    test_rows = camus.select(tests, options.test_split, patients=profile.patients)
    _enough(rows, options.patients, options.train_split, options.data)
    downstream.check_apart(rows, test_rows)
    drawn, geometry = None, data.Geometry(profile.side, options.stretch)
    if options.synthetic:
        drawn = synthetic.read_frames(options.synthetic, profile.side)
        if options.task == "segmentation":
            downstream.check_label_maps(drawn, options.synthetic)
        geometry = drawn
    real, test = (data.load_frames(r, geometry, cache_dir=cache) for r in (rows, test_rows))
    arm, name = "real", options.synthetic and options.synthetic.name
    if drawn is not None:
        arm = f"{name} alone" if options.synthetic_only else f"real + {options.share:g} {name}"
    settings = {"steps": options.steps}
    if options.no_augmentation:
        settings |= data.STILL
    if options.task == "segmentation":
        train, settings["recipe"] = downstream.segmentation_run, options.recipe
    else:
        train = downstream.classification_run
        settings |= {"network": options.network, "pretrained": options.pretrained}
    done = []
    for seed in range(options.seeds):
        frames = real
        if drawn is not None:
            frames = drawn
            if not options.synthetic_only:
                frames = downstream.with_synthetic(real, drawn, options.share, seed)
        if options.match_epochs:
            steps = options.steps or getattr(profile, options.task).steps
            settings["steps"] = round(steps * len(frames) / len(real))
        print(f"{arm}, seed {seed}: {len(frames)} frames", flush=True)
        done.append(train(frames, test, profile, seed=seed, **settings) | {"arm": arm})
    print(runs.summary(done).T.to_string(float_format="{:.3f}".format))
    if options.json:
        results.save(
            options.json.parent,
            options.json.stem,
            {"version": downstream.RUN_VERSION, "arm": arm, "runs": done},
            world=table.attrs["world"],
            profile=profile.name,
            split=options.test_split,
            seeds=range(options.seeds),
            command=options.line,
        )
        print(f"wrote {options.json}")


def _official(path):
    """The folder to read for `--data`, which may be CAMUS in any form."""
    from diffecho_utils import releases

    folder = releases.official(path, progress=_progress("patients converted"))
    if folder != path:
        print(f"{path}: read by way of {folder}", flush=True)
        for note in json.loads((folder / "dataset.json").read_text())["notes"]:
            print(f"note: {note}")
    return folder


def _progress(unit):
    """A progress function for terminals: one line, rewritten; silent elsewhere but for the end."""

    def progress(done, total, unit=unit):
        if sys.stderr.isatty():
            print(
                f"\r{done}/{total} {unit}",
                end="\n" if done == total else "",
                file=sys.stderr,
                flush=True,
            )
        elif done == total:
            print(f"{done}/{total} {unit}", file=sys.stderr)

    return progress


def _number(kind, low, high=math.inf):
    """A reader of numbers for argparse: of this kind, from `low` to `high`, so never NaN."""

    def read(text):
        value = kind(text)
        if not low <= value <= high:
            upper = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low:g}{upper}")
        return value

    read.__name__ = {int: "whole number", float: "number"}[kind]
    return read


_COUNT, _SEED = _number(int, 1), _number(int, 0, 2**32 - 1)
_POSITIVE = _number(float, 1e-12, 1e6)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m diffecho_utils", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    sub = command("phantom", phantom_command, "write a procedural stand-in for CAMUS")
    sub.add_argument("out", type=Path, metavar="OUT")
    sub.add_argument("--patients", type=_COUNT, default=60)
    sub.add_argument("--seed", type=_SEED, default=0)
    sub.add_argument(
        "--half-sequences", action="store_true", help="also write the ED-to-ES sequences"
    )

    sub = command(
        "check", check_command, "list everything wrong with a CAMUS folder; exit 0 if nothing"
    )
    sub.add_argument("root", type=Path, metavar="ROOT")
    sub.add_argument("--json", action="store_true", help="print the list as JSON")

    sub = command(
        "convert",
        convert_command,
        "write any other form of CAMUS (mhd, HDF5, PNG, nnU-Net, flat NIfTI) in the official layout",
    )
    sub.add_argument("source", type=Path, metavar="SOURCE")
    sub.add_argument("dest", type=Path, metavar="DEST")

    sub = command(
        "download", download_command, "download CAMUS; interrupted downloads go on when repeated"
    )
    sub.add_argument("dest", type=Path, metavar="DEST")
    sub.add_argument(
        "--accept-licence", action="store_true", help="accept CC BY-NC-SA 4.0 (without it: shown)"
    )
    sub.add_argument("--url", nargs="+", help="addresses of the zips; default: the official server")
    sub.add_argument("--patients", type=_COUNT, default=500, help="how many must be in it")
    sub.add_argument("--restart", action="store_true", help="from the beginning; default: goes on")

    sub = command("prompts", prompts_command, "write the prompts of a folder's frames as a table")
    sub.add_argument("root", type=Path, metavar="ROOT")
    sub.add_argument("out", type=Path, metavar="OUT.csv")
    sub.add_argument("--template", default="clinical", choices=prompts.TEMPLATES)

    sub = command("train", train_command, "train a network; interrupted runs go on when repeated")
    models = "autoencoder clip unconditional text text-seg sdm segmenter classifier".split()
    sub.add_argument("model", choices=models, metavar="MODEL", help=", ".join(models))
    sub.add_argument("--data", type=Path, required=True, metavar="ROOT")
    sub.add_argument("--split", default="training", choices=_SPLITS)
    sub.add_argument("--profile", default="cpu")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    for needed in ("autoencoder", "clip", "text"):
        sub.add_argument(
            f"--{needed}", type=Path, metavar="DIR", help="default: the shipped one of this world"
        )
    sub.add_argument(
        "--restart", action="store_true", help="throw away the run in DIR; default: it goes on"
    )
    sub.add_argument(
        "--steps", type=_COUNT, nargs="+", help="one number a stage; default: the profile's"
    )
    sub.add_argument("--batch", type=_COUNT)
    sub.add_argument("--accumulation", type=_COUNT, help="batches to a step of the optimiser")
    sub.add_argument("--learning-rate", type=_POSITIVE)
    sub.add_argument(
        "--ema", type=_number(float, 0, 0.999999), help="decay of the averaged weights"
    )
    sub.add_argument("--prediction", choices=("v_prediction", "epsilon"))
    sub.add_argument(
        "--snr-gamma", type=_POSITIVE, help="min-SNR weights of the timesteps, usually 5"
    )
    sub.add_argument("--minutes", type=_POSITIVE, help="as many steps as fit in this time, a stage")
    sub.add_argument(
        "--start", type=Path, metavar="DIR", help="go on from this checkpoint's weights"
    )
    sub.add_argument(
        "--stretch", action="store_true", help="frames to squares, as re-packs do; default: padded"
    )
    sub.add_argument("--latent-channels", type=_COUNT)
    sub.add_argument(
        "--width",
        type=_number(float, 0.05, 20),
        help="networks so many times as wide as the profile's",
    )
    sub.add_argument(
        "--views", type=_COUNT, help="cached copies of each frame, all but one jittered"
    )
    sub.add_argument("--patients", type=_COUNT, help="the first so many of the split only")
    sub.add_argument("--seed", type=_SEED, default=0)

    sub = command(
        "sample", sample_command, "write a synthetic data set; interrupted runs go on when repeated"
    )
    models = "unconditional text text-seg sdm".split()
    sub.add_argument("model", choices=models, metavar="MODEL", help=", ".join(models))
    sub.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--n", type=_COUNT, default=50, help="images of each of the four classes")
    sub.add_argument("--masks", type=Path, metavar="ROOT", help="a CAMUS folder: its label maps")
    sub.add_argument("--split", default="training", choices=_SPLITS, help="of the label maps")
    sub.add_argument("--patients", type=_COUNT, help="label maps of the first so many of the split")
    sub.add_argument(
        "--template", choices=prompts.TEMPLATES, help="of the prompts; default: the paper's"
    )
    sub.add_argument(
        "--guidance",
        type=_number(float, 0, 1000),
        help="weight of the condition; 1: as trained; default: the checkpoint's",
    )
    sub.add_argument(
        "--guidance-interval",
        type=_number(int, 0, 999),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="timesteps of the guidance, 0 (picture) to 999 (noise); default: all",
    )
    sub.add_argument("--steps", type=_number(int, 1, 1000), default=20, help="of the solver")
    sub.add_argument("--solver", default="DPM-Solver++", help="DDPM, DDIM, Euler, UniPC or this")
    sub.add_argument("--batch", type=_COUNT, default=50, help="images drawn at a time")
    sub.add_argument(
        "--restart", action="store_true", help="throw away the set in DIR; default: it goes on"
    )
    sub.add_argument(
        "--seed", type=_SEED, default=0, help="seed of the first image; the next counts on"
    )

    sub = command(
        "evaluate", evaluate_command, "how near a synthetic set comes to a CAMUS folder's frames"
    )
    sub.add_argument("synthetic", type=Path, metavar="SYNTHETIC")
    sub.add_argument("--data", type=Path, required=True, metavar="ROOT")
    sub.add_argument("--split", default="validation", choices=camus.SPLITS, help="held-out split")
    sub.add_argument("--profile", default="cpu")
    sub.add_argument(
        "--features",
        default="autoencoder",
        choices=("autoencoder", "classifier", "clip", "inception"),
        help="the network whose features are compared",
    )
    sub.add_argument("--autoencoder", type=Path, metavar="DIR", help="default: the shipped one")
    sub.add_argument(
        "--inception", type=Path, metavar="FILE", help="TorchScript file; default: torch-fidelity's"
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the table as a record")
    sub.add_argument("--figure", type=Path, metavar="FILE", help="draw it: .png, .pdf or .svg")

    sub = command(
        "downstream",
        downstream_command,
        "train and score networks with and without synthetic frames",
    )
    sub.add_argument("task", choices=("segmentation", "classification"))
    sub.add_argument("--data", type=Path, required=True, metavar="ROOT", help="a CAMUS folder")
    sub.add_argument("--synthetic", type=Path, metavar="DIR", help="a set that `sample` wrote")
    sub.add_argument("--share", type=_POSITIVE, default=1.0, help="synthetic frames for a real one")
    sub.add_argument("--synthetic-only", action="store_true", help="train on the set alone")
    sub.add_argument("--train-split", default="training", choices=_SPLITS)
    sub.add_argument("--test-split", default="validation", choices=camus.SPLITS)
    sub.add_argument("--test-data", type=Path, metavar="ROOT", help="another folder to test on")
    sub.add_argument("--patients", type=_COUNT, help="train on the first so many only")
    sub.add_argument("--profile", default="cpu")
    sub.add_argument("--recipe", default="tuned", choices=("tuned", "paper"), help="segmentation")
    sub.add_argument("--network", default="small", help="classification: small, resnet18, ...")
    sub.add_argument(
        "--pretrained", action="store_true", help="classification: ImageNet weights (torchvision)"
    )
    sub.add_argument("--steps", type=_COUNT, help="of the optimiser; default: the recipe's")
    sub.add_argument(
        "--match-epochs",
        action="store_true",
        help="more frames, more steps; default: the same steps in every arm",
    )
    sub.add_argument("--no-augmentation", action="store_true", help="frames as they are")
    sub.add_argument(
        "--stretch", action="store_true", help="frames to a square, as CAMUS's common re-packs"
    )
    sub.add_argument("--seeds", type=_COUNT, default=1, help="so many runs, seeds 0, 1, ...")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the runs as a record")

    return parser


if __name__ == "__main__":
    sys.exit(main())
