"""The command line: `python -m diffecho_utils COMMAND --help`. Thin over what the notebooks call.

A command's signature is its interface. What is slow to import is imported inside, so that help comes at once.
"""

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

from typer import Argument, Context, Exit, Option, Typer

from diffecho_utils import DiffEchoError

PROGRAM = "python -m diffecho_utils"
app = Typer(
    help="From a CAMUS folder to trained networks, synthetic sets, and what these are good for.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def option(kind, text="", name=None, low=None, high=None, metavar=None):
    """The type of an option: its kind, range (which keeps out NaN, too) and line of help."""
    metavar = metavar or {int: "N", float: "X", str: "NAME", Path: "DIR"}.get(kind)
    names = [f"--{name}"] if name else []  # by default the parameter's
    return Annotated[kind | None, Option(*names, metavar=metavar, help=text, min=low, max=high)]


def argument(metavar, kind=Path):
    """The type of an argument; the words to choose from are its help, which wraps."""
    text = ", ".join(get_args(kind))
    return Annotated[kind, Argument(metavar=metavar, show_choices=False, help=text)]


flag, string, place = (partial(option, kind) for kind in (bool, str, Path))
count, number = partial(option, int, low=1), partial(option, float, low=1e-12, high=1e6)

# What several commands are given
DATA = place("a CAMUS folder, in any form", "data", metavar="ROOT")
OUT = place("to write to")
BASE = string("Stable Diffusion 1.x: a folder, or a name on the Hub")
PROFILE = string("smoke, cpu, gpu or paper")
SEED = count(low=0, high=2**32 - 1)
RESTART = flag("throw away what DIR holds; default: it goes on", "restart")
STRETCH = flag("frames to squares, as re-packs do; default: padded", "stretch")
FOLD = count("its splits instead: one of ten folds of cross-validation", high=10)
SHIPPED = place("default: the shipped one")
INTERVAL = option(
    tuple[int, int],
    "timesteps of the guidance, 0 (picture) to 999 (noise); default: all",
    low=0,
    high=999,
    metavar="LOW HIGH",
)
RECORD = place("write it as a record", "json", metavar="FILE")
SPLIT = Literal["training", "validation", "testing"]  # camus.SPLITS
ANY_SPLIT = Literal[SPLIT, "all"]  # all: every patient, listed or not
GENERATOR = Literal["unconditional", "text", "text-seg", "sdm"]
MODEL = Literal[
    "autoencoder", "clip", GENERATOR, "segmenter", "classifier", "sdm-student", "small-decoder"
]
FEATURES = Literal["autoencoder", "classifier", "clip", "inception"]
RECIPE = ("batch", "accumulation", "learning_rate", "ema", "prediction", "snr_gamma")
TEMPLATE = Literal["paper", "paper-seg", "random", "clinical"]  # prompts.TEMPLATES


def main(arguments=None):
    """Run one command; returns the exit status: 0 done, 1 bad input, 2 bad usage, 130 interrupted."""
    words = list(map(str, sys.argv[1:] if arguments is None else arguments))
    try:
        return said(lambda: app(_repeated(words), prog_name=PROGRAM, obj=_line(words)))
    except SystemExit as stopped:  # so typer ends, well or not
        if stopped.code == 130:
            print("interrupted", file=sys.stderr)
        return stopped.code


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


def _repeated(words):
    """`--steps 30 20`, a number a stage, and `--url A B` as typer reads them: `--steps 30 --steps 20`."""
    several = {"train": "--steps", "download": "--url"}.get("".join(words[:1]), "")
    repeated, current = [], None
    for word in words:
        if word.startswith("--"):
            current = word
        elif current == several and repeated[-1] != several:
            repeated.append(several)
        repeated.append(word)
    return repeated


def _line(words):
    """The whole command for a record, its folders and files by their names alone."""
    named = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        named.append(option + equals + (Path(value).name if "/" in value else value))
    return f"{PROGRAM} {shlex.join(named)}"


def _progress(done, total, unit):
    """What is done of a long command: one line of a terminal, rewritten; elsewhere its end alone."""
    terminal = sys.stderr.isatty()
    if terminal or done == total:
        start, end = "\r" if terminal else "", "\n" if done == total else ""
        counted = f"{done}/{'?' if total is None else total} {unit}"
        print(start + counted, end=end, file=sys.stderr, flush=True)


def _official(root):
    """The folder to read for `--data`, which may be CAMUS in any form."""
    from diffecho_utils import releases

    folder = releases.official(root, progress=_progress)
    if folder != root:
        print(f"{root}: read by way of {folder}")
        for note in json.loads((folder / "dataset.json").read_text())["notes"]:
            print(f"note: {note}")
    return folder


def _frames(root, split, like, wanted=None, most=None, fold=None):
    """`data.open_frames` of `wanted` patients, no fewer, or of `most` at most."""
    from diffecho_utils import data

    frames = data.open_frames(root, split, like, wanted or most, fold)
    found = frames.table["patient"].nunique()
    if wanted and found < wanted:
        raise DiffEchoError(
            f"{root}: {found} patients in {split}, {wanted} were asked for; ask for fewer"
        )
    return frames


def _save(file, values, root, profile, split, command, seeds=()):
    """Write the record that `--json` names."""
    from diffecho_utils import camus, results

    made = {"world": camus.world(root), "profile": profile.name, "split": split, "seeds": seeds}
    results.save(file.parent, file.stem, values, command=command, **made)
    print(f"wrote {file}")


@app.command("phantom")
def phantom_command(out: argument("OUT"), patients: count() = 60, seed: SEED = 0):
    """Write a procedural stand-in for CAMUS."""
    from diffecho_utils import phantom

    root = phantom.write(out, patients, seed, progress=_progress)
    print(f"wrote {patients} patients to {root}")


@app.command("check")
def check_command(root: argument("ROOT"), as_json: flag("print the list as JSON", "json") = False):
    """List everything wrong with a CAMUS folder; exit 0 if nothing."""
    from diffecho_utils import camus, checks

    problems, notes = checks.examine(root, progress=None if as_json else _progress)
    if as_json:
        report = {"root": str(root), "usable": not problems}
        for kind, lines in (("problem", problems), ("note", notes)):
            pairs = [zip(("path", kind), line.split(": ", 1), strict=True) for line in lines]
            report[f"{kind}s"] = [dict(pair) for pair in pairs]
        print(json.dumps(report, indent=1))
        raise Exit(bool(problems))
    for line in [*problems, *(f"note: {note}" for note in notes)]:
        print(line)
    if problems:
        print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {root}")
        raise Exit(1)
    table = camus.read_table(root)
    splits = table.groupby("split", dropna=False).patient.nunique().to_dict()
    print(f"{root}: {len(table)} frames of {table.patient.nunique()} patients, all usable")
    print("patients in each split: " + ", ".join(f"{k or 'none'} {n}" for k, n in splits.items()))


@app.command("convert")
def convert_command(source: argument("SOURCE"), dest: argument("DEST")):
    """Write any other form of CAMUS in the official layout.

    Known are mhd, HDF5, PNG, nnU-Net and flat NIfTI.
    """
    from diffecho_utils import releases

    release = releases.convert(source, dest, progress=_progress)
    print(f"wrote {len(release.pictures)} patients, from form {release.form}, to {dest}")
    for note in release.notes:
        print(f"note: {note}")


@app.command("download")
def download_command(
    dest: argument("DEST"),
    accept_licence: flag("accept CC BY-NC-SA 4.0; without it: shown", "accept-licence") = False,
    url: option(list[str], "of the zips; default: the official server", metavar="URL...") = None,
    patients: count("how many must be in it") = 500,
    restart: flag("from the beginning; default: goes on", "restart") = False,
):
    """Download CAMUS; interrupted downloads go on when repeated."""
    from diffecho_utils import download

    if accept_licence:
        print(f"{download.LICENCE}\nAccepted.")
    urls = url or download.URLS
    root = download.download(dest, accept_licence, urls, patients, _progress, restart)
    print(f"wrote CAMUS, {patients} patients, to {root}")


@app.command("prompts")
def prompts_command(
    root: argument("ROOT"), out: argument("OUT.csv"), template: TEMPLATE = "clinical"
):
    """Write the prompts of a folder's frames as a table."""
    from diffecho_utils import data, files, profiles, prompts

    frames = data.open_frames(root, "all", profiles.get("cpu"))
    table = prompts.wordings(prompts.facts(frames.masks, frames.table), template)
    files.write_text(out, table.to_csv(index=False, lineterminator="\n"))
    print(f"wrote {prompts.WORDINGS} prompts for each of {len(frames)} frames to {out}")


@app.command("train")
def train_command(
    context: Context,
    model: argument("MODEL", MODEL),
    root: DATA,
    out: OUT,
    split: ANY_SPLIT = "training",
    fold: FOLD = None,
    profile: PROFILE = "cpu",
    autoencoder: SHIPPED = None,
    clip: SHIPPED = None,
    text: SHIPPED = None,
    sdm: SHIPPED = None,
    base: BASE = None,
    lora: count("text: rank of LoRA on the base; default: its whole UNet") = None,
    template: option(
        list[str], "prompts to learn from; repeat it for several", metavar="NAME"
    ) = None,
    restart: RESTART = False,
    steps: option(list[int], "one a stage; default: the profile's", low=1, metavar="N...") = None,
    batch: count() = None,
    accumulation: count("batches to a step of the optimiser") = None,
    learning_rate: number() = None,
    ema: number("decay of the averaged weights", low=0, high=0.999999) = None,
    prediction: Literal["v_prediction", "epsilon"] | None = None,
    snr_gamma: number("min-SNR weights of the timesteps, usually 5") = None,
    minutes: number("as many steps as fit in this time, a stage") = None,
    start: place("go on from this checkpoint's weights") = None,
    stretch: STRETCH = False,
    latent_channels: count() = None,
    views: count("cached copies of each frame, all but one jittered") = None,
    patients: count("the first so many of the split only") = None,
    seed: SEED = 0,
):
    """Train a network; interrupted runs go on when repeated."""
    from dataclasses import replace

    from diffecho_utils import assets, camus, profiles, results, training

    root, profile = _official(root), replace(profiles.get(profile), stretched=stretch)
    rows = {"latent_channels": latent_channels, "jittered_views": views, "patients": patients}
    rows["base"] = base
    profile = replace(profile, **{name: value for name, value in rows.items() if value})
    recipe = {name: context.params[name] for name in RECIPE}
    profile = profiles.adapt(profile, "lora" if lora else model, steps=steps, **recipe)
    frames = _frames(root, split, profile, patients, profile.patients, fold)
    missing = [name for i, name in enumerate(camus.CLASS_NAMES) if i not in frames.classes]
    if missing:
        print(f"note: no frames of {', '.join(missing)}: the network learns the other classes only")
    needs = {"autoencoder": autoencoder, "clip": clip, "text": text, "sdm": sdm}
    needs = {
        name: needs[name] or assets.checkpoint(frames.table.attrs["world"], name)
        for name in training.builds_on(model, profile)
    }
    how = {"needs": needs, "restart": restart, "seed": seed, "minutes": minutes, "start": start}
    how |= {"lora": lora} | ({"templates": tuple(template)} if template else {})
    made, cache = results.provenance(context.obj), assets.workspace() / "cache"
    training.train(model, frames, profile, out, provenance=made, cache_dir=cache, **how)
    print(f"wrote {out}")


@app.command("sample")
def sample_command(
    model: argument("MODEL", GENERATOR),
    checkpoint: place("of the trained generator"),
    out: OUT,
    base: option(str, "where it lies by now; default: where it was", metavar="NAME") = None,
    decoder: place("a small decoder, for speed; default: the autoencoder's") = None,
    n: count("images of each of the four classes") = 50,
    masks: place("a CAMUS folder: its label maps", metavar="ROOT") = None,
    split: option(ANY_SPLIT, "of the label maps") = "training",
    fold: FOLD = None,
    patients: count("label maps of the first so many of the split") = None,
    template: option(TEMPLATE, "of the prompts; default: the paper's") = None,
    guidance: number("weight; 1: as trained; default: the checkpoint's", low=0, high=1e3) = None,
    guidance_interval: INTERVAL = None,
    steps: count("of the solver", high=1000) = 20,
    solver: string("DDPM, DDIM, Euler, UniPC or this") = "DPM-Solver++",
    batch: count("images drawn at a time") = 50,
    restart: RESTART = False,
    seed: count("of the first image; the next counts on", low=0, high=2**32 - 1) = 0,
):
    """Write a synthetic data set; interrupted sets go on when repeated."""
    from diffecho_utils import camus, checkpoints, models, sampling, synthetic

    if masks and "masks" not in sampling.CONDITIONS[model]:
        raise DiffEchoError(f"{model} is told no label maps; leave --masks out")
    generator = checkpoints.load_generator(checkpoint, base, decoder)
    if generator.model != model:
        raise DiffEchoError(f"{checkpoint}: a checkpoint of {generator.model}")
    state, made = models.processes(), checkpoints.read_training(checkpoint)
    facts = {key: made.get(key) for key in ("world", "profile", "commit", "stretched")}
    facts |= {"decoder": decoder.name} if decoder else {}
    frames, classes = None, generator.classes
    if masks:
        frames = _frames(_official(masks), split, generator, patients, fold=fold)
        classes = sorted(set(frames.classes.tolist()))
        world, names = frames.table.attrs["world"], frames.table["patient"].unique()
        facts |= {"masks_world": world, "masks_split": split, "masks_patients": len(names)}
    table, maps = synthetic.plan(model, n, frames, template, classes)
    synthetic.write(
        generator.to(state.device),
        out,
        table,
        maps,
        steps,
        seed=seed,
        guidance=guidance,
        guidance_interval=guidance_interval,
        solver=solver,
        facts=facts,
        progress=_progress if state.is_main_process else None,
        batch=batch,
        restart=restart,
    )
    if state.is_main_process:
        names = ", ".join(camus.CLASS_NAMES[index] for index in classes)
        print(f"wrote {len(table)} images, {n} of each class ({names}), to {out}")


@app.command("evaluate")
def evaluate_command(
    context: Context,
    synthetic: argument("SYNTHETIC"),
    root: DATA,
    split: option(SPLIT, "held-out split") = "validation",
    profile: PROFILE = "cpu",
    features: option(FEATURES, "the network whose features are compared") = "autoencoder",
    autoencoder: SHIPPED = None,
    inception: place("TorchScript; default: torch-fidelity's", metavar="FILE") = None,
    record: RECORD = None,
    figure: place("draw it: .png, .pdf or .svg", metavar="FILE") = None,
):
    """Compare a synthetic set with the frames of a CAMUS folder."""
    from diffecho_utils import downstream, metrics, plots, profiles

    if figure and figure.suffix not in (".png", ".pdf", ".svg"):
        raise DiffEchoError(f"{figure}: a figure ends in one of .png .pdf .svg")
    root, profile = _official(root), profiles.get(profile)
    see = metrics.feature_space(features, autoencoder, inception)
    values = downstream.evaluate(synthetic, root, split, see, profile.patients)
    title = f"{synthetic.name}: {values['n']['all']:g} images, features of the {features}"
    print(f"{title}; floor: {split} frames of {root.name}")
    print(values.T.to_string(float_format="{:.3f}".format, na_rep="-"))
    if values["precision"].isna().any():
        few = values.index[values["precision"].isna()]
        print(f"{', '.join(few)}: fewer than the 6 images that precision and its like need")
    if record:
        _save(record, values.to_dict("index"), root, profile, split, context.obj)
    if figure:
        drawn = plots.panel(values)
        drawn.suptitle(title)
        figure.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(figure, dpi=150)
        print(f"wrote {figure}")


@app.command("downstream")
def downstream_command(
    context: Context,
    task: argument("TASK", Literal["segmentation", "classification"]),
    root: DATA,
    drawn: place("a set that `sample` wrote", "synthetic") = None,
    share: number("synthetic frames for a real one") = 1.0,
    alone: flag("train on the set alone", "synthetic-only") = False,
    train_split: ANY_SPLIT = "training",
    test_split: SPLIT = "validation",
    fold: FOLD = None,
    test_root: place("another folder to test on", "test-data", metavar="ROOT") = None,
    patients: count("train on the first so many only") = None,
    profile: PROFILE = "cpu",
    recipe: option(Literal["tuned", "paper"], "segmentation") = "tuned",
    network: string("classification: small, resnet18, ...") = "small",
    pretrained: flag("classification: ImageNet weights (torchvision)", "pretrained") = False,
    steps: count("of the optimiser; default: the recipe's") = None,
    match_epochs: flag("more steps for more frames; default: the same", "match-epochs") = False,
    no_augmentation: flag("frames as they are", "no-augmentation") = False,
    stretch: STRETCH = False,
    seeds: count("so many runs, seeds 0, 1, ...") = 1,
    record: RECORD = None,
):
    """Train and score networks with and without synthetic frames."""
    from diffecho_utils import data, downstream, profiles, runs, synthetic

    if alone and not drawn:
        raise DiffEchoError("--synthetic-only trains on a set; name one with --synthetic DIR")
    root, profile = _official(root), profiles.get(profile)
    arm, geometry, added = "real", data.Geometry(profile.side, stretch), None
    if drawn:
        arm = f"{drawn.name} alone" if alone else f"real + {share:g} {drawn.name}"
        added = geometry = synthetic.read_frames(drawn, profile.side)
        if task == "segmentation":
            downstream.check_label_maps(added, drawn)
    real = _frames(root, train_split, geometry, patients, profile.patients, fold)
    tests, fold = (_official(test_root), None) if test_root else (root, fold)
    test = _frames(tests, test_split, geometry, most=profile.patients, fold=fold)
    downstream.check_apart(real.table, test.table)
    settings = {"network": network, "pretrained": pretrained}
    lengths = {"seeds": seeds, "steps": steps, "match_epochs": match_epochs}
    done = downstream.arm(
        arm,
        task,
        real,
        test,
        profile,
        drawn=added,
        share=None if alone else share,
        **lengths,
        **({"recipe": recipe} if task == "segmentation" else settings),
        **(data.STILL if no_augmentation else {}),
    )
    print(runs.summary(done).T.to_string(float_format="{:.3f}".format))
    if record:
        values = {"version": downstream.RUN_VERSION, "arm": arm, "runs": done}
        _save(record, values, root, profile, test_split, context.obj, range(seeds))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # whoever reads a log sees each line at once
    sys.exit(main())
