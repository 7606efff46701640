"""Pretrain, evaluate and export.

accelerate launch pretrain/run.py                                   # the embedded digits, minutes on 2 CPU cores
accelerate launch pretrain/run.py RECIPE.yaml key=value ...         # your own recipe, with changes
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from data import digits
from data.errors import UserError
from data.skips import Skips
from data.source import Source
from data.stream import STATE, open_cache, open_split, open_train
from eval.encoders import Pretrained
from eval.report import RESULTS, read_results, table, write_evaluation
from eval.run import about, evaluate
from eval.splits import read_labels
from pretrain.checkpoint import load_encoder
from pretrain.config import Config, find_recipe, given_yaml, load_config
from pretrain.doctor import examine
from pretrain.engine import Stopped, pretrain
from pretrain.explain import commented_yaml, explain
from pretrain.export import check_exportable, export, find_whole, read_exportable, sample_of
from pretrain.exports.folders import FOLDERS
from pretrain.model.encoder import Encoder
from pretrain.ranks import first_alone
from pretrain.start import start_accelerator
from pretrain.summary import previous_results, results_table, warnings_of

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "digits.yaml"
HELP = """\
Pretrain one Transformer encoder on paired image, text and audio; then probe it and export it.

  accelerate launch pretrain/run.py                          the embedded digits recipe
  accelerate launch pretrain/run.py RECIPE.yaml              a recipe of your own
  accelerate launch pretrain/run.py RECIPE.yaml train.steps=1000 model.width=256
  python pretrain/run.py RECIPE.yaml --print-config          show every setting, train nothing

A run that was stopped goes on from its newest checkpoint when it is started again."""
EPILOG = """\
Settings: pretrain/recipes/digits.yaml shows those that matter; --print-config shows all of them.
The folder `out` gets config.yaml, env.json, metrics.jsonl, checkpoints/, eval/results.json and
export/, whose folders load with transformers; export/README.md says what each is.
Exit code: 0 when all is done, 2 for a mistake in the recipe, the shards or the checkpoint; after
the message `accelerate launch` makes it 1 and adds a traceback of its own (none with --quiet)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="pretrain/run.py", description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="YAML file; default: the digits recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the recipe")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="say what a setting, such as train.warmup, means, or without KEY which sections there are, and stop",
    )
    arguments = parser.parse_intermixed_args(argv)
    recipe, overrides = arguments.recipe, list(arguments.overrides)
    if recipe is not None and "=" in recipe:  # no recipe was given, only settings
        recipe, overrides = None, [recipe, *overrides]
    try:
        if arguments.explain is not None:
            print(explain(arguments.explain))
            return 0
        path = find_recipe(recipe) if recipe else DEFAULT_RECIPE
        config = load_config(path, overrides)
        if arguments.print_config:
            print(commented_yaml(config), end="")
            return 0
        run(config, given_yaml(path, overrides))
    except Stopped as stopped:
        if PartialState().is_main_process:
            print(stopped)
        return 0
    except (UserError, OSError) as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 2
    return 0


def run(config: Config, given: str | None = None) -> None:
    """Build the embedded data if asked for, train, export, evaluate, and say what came out.

    Args:
        config: the whole run.
        given: what of it the user gave, to be kept beside it.
    """
    if config.dry_run:
        config = rehearsal(config)
    accelerator = start_accelerator(config)
    names = config.export.folders
    check_exportable(
        config.model, config.data.views, Path(config.out) / "export", config.tokenizer.name, config.objectives, names
    )
    if config.doctor:
        accelerator.print(examine(config, accelerator))
        accelerator.end_training()
        return
    device = accelerator.device
    # It builds what is not there: data, and the shards' indices.
    with first_alone(accelerator.is_main_process, accelerator.num_processes):
        if config.data.embedded == "digits":
            digits.build(Path(config.data.root))
        sources = open_train(config.data)
    scored = config.eval.label is not None
    splits: dict[str, Source] = {}
    if scored:  # a wrong label should show now, not after the training
        train = [shard for source in sources for shard in source.shards]
        splits["train"] = Source(train, cache=open_cache(config.data))
        splits["val"], splits["test"] = (open_split(config.data, p) for p in (config.data.val, config.data.test))
        read_labels(splits, config.eval)

    checkpoint = pretrain(config, sources, accelerator, given)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    out = Path(config.out)
    encoder, tokenizer = load_encoder(checkpoint)
    scores = ""
    if scored:
        folder = out / "eval"
        with (checkpoint / "encoder" / "model.safetensors").open("rb") as file:
            weights = {"name": str(checkpoint), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        subject = about(weights, splits, config.eval)
        results = read_results(folder / RESULTS, subject)
        if results is None:
            before = previous_results(folder / RESULTS, subject)
            subject_of = Pretrained(str(checkpoint), encoder, tokenizer)
            evaluated = evaluate(subject_of, splits, config.eval, device, config.data.workers, run=out)
            results = evaluated.results
            write_evaluation(folder, results, subject, evaluated.predictions, evaluated.page)
            scores = results_table(results, before) + "\n\n"
        else:
            scores = table(results) + "\n\n"
    made = read_exportable(checkpoint)  # now, since its cards show the results
    folders = find_whole(made, out / "export", names)
    if folders is None:
        sample = sample_of(sources, made.encoder.views)
        folders = export(
            made.encoder, made.tokenizer, out / "export", made.objectives, made.about, sample=sample, names=names
        )
    else:
        print(f"export      {out / 'export'} is whole and of this checkpoint: kept as it is")
    found = "".join(f"WARNING     {warning}\n" for warning in warnings(config, encoder))
    screen = closing_screen(out, checkpoint, list(folders))
    print("\n" + scores + skipped_samples(checkpoint) + found + "\n" * bool(found) + screen)


def rehearsal(config: Config) -> Config:
    """Two steps of the run, saved, looked at and tracked by nobody, in a folder of their own that begins empty."""
    out = Path(config.out) / "dry_run"
    shutil.rmtree(out, ignore_errors=True)
    every = None if config.eval.monitor.every is None else 1
    return replace(
        config,
        out=str(out),
        resume="auto",
        train=replace(config.train, steps=2, log_every=1, save_every=1),
        eval=replace(config.eval, monitor=replace(config.eval.monitor, every=every)),
        trackers=replace(config.trackers, names=[]),
    )


def warnings(config: Config, encoder: Encoder) -> list[str]:
    """What metrics.jsonl shows that one should know of."""
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    looks = [line for line in lines if any(name.startswith("rankme/") for name in line)]
    probe = {name: value for name, value in (looks[-1] if looks else {}).items() if isinstance(value, float)}
    dims = dict.fromkeys(encoder.views.used, min(encoder.config.width, config.eval.monitor.samples))
    return warnings_of(lines, probe, dims)


def closing_screen(out: Path, checkpoint: Path, folders: Sequence[str]) -> str:
    """What lies where, and the commands to copy next."""
    results, python = out / "eval" / "results.json", shlex.quote(os.path.relpath(sys.executable))
    folder, loads = json.dumps(str(out / "export" / folders[0])), FOLDERS[folders[0]].loads
    page = results.with_name("report.html")
    report = f"\nreport      {page}" if page.exists() else ""
    load = f"from transformers import {loads}; print({loads}.from_pretrained({folder}))"
    return f"""\
run         {out}
checkpoint  {checkpoint}
metrics     {out / "metrics.jsonl"}
results     {results if results.exists() else "none: eval.label is null"}{report}
export      {out / "export"}/{{{",".join(folders)}}}

next
  load      {python} -c {shlex.quote(load)}
  export    {python} pretrain/export.py {shlex.quote(str(checkpoint))} exported
  resume    start the same command again: it goes on from the newest checkpoint
"""


def skipped_samples(checkpoint: Path) -> str:
    """What the run could not use of its data, counted."""
    skips = Skips()
    skips.restore(json.loads((checkpoint / STATE).read_text())["skipped"])
    if not skips.total:
        return ""
    return (
        f"skipped     {skips.total} rows got another sample than theirs, which could not be used:\n{skips.table()}\n\n"
    )


if __name__ == "__main__":
    disable_progress_bar()  # saving and loading take milliseconds a file
    sys.exit(main())
