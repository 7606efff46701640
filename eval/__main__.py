"""Score encoders, compare them, write reports.

    python -m eval run ENCODER --train 'train-*.tar' --test 'test-*.tar' --label label --out scores/mine
    python -m eval compare scores/mine scores/other --plot differences.png
    python -m eval report scores/mine

ENCODER is a run, a checkpoint, an export, any vision, text, audio or dual model of transformers by path or hub id,
`random:ENCODER` (its architecture with random weights) or `raw:ENCODER` (the inputs that it reads, themselves; `raw:`
alone: in the default views).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from data.errors import UserError
from data.index import find_shards, load_shards
from data.source import Source
from eval.compare import compare, plot
from eval.compare import table as comparison_table
from eval.encoders import load_scored
from eval.features import World
from eval.report import table, write_evaluation, write_reports
from eval.run import about, evaluate
from eval.scored import LAST, POOLINGS
from eval.tasks import TASKS, EvalConfig, EvaluationError
from eval.zeroshot import read_prompts


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    parser = argparse.ArgumentParser(
        prog="python -m eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="score an encoder")
    run.add_argument("encoder", help="a run, checkpoint, export or model; random:ENCODER; raw:ENCODER; raw:")
    for name in ("train", "val", "test"):
        required = name != "val"
        note = "" if required else "; without it a tenth of train"
        run.add_argument(f"--{name}", nargs="+", required=required, metavar="SHARDS", help=f"{name} shards{note}")
    run.add_argument("--label", help="field of the .json that holds the class; without it, tasks that need none")
    run.add_argument("--group", help="field of the .json; its samples stay together where validation is cut from train")
    run.add_argument("--tasks", help=f"of {','.join(TASKS)}; all but attentive if not given")
    run.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="class names, for zero-shot")
    run.add_argument("--templates", nargs="+", metavar="TEXT", help="prompts with {} for the class, for zero-shot")
    run.add_argument("--prompts", type=Path, help="file with templates, a line each, or JSON with classes, too")
    run.add_argument("--layers", nargs="+", type=int, default=[LAST], metavar="N", help="of several validation chooses")
    run.add_argument("--poolings", nargs="+", choices=POOLINGS, default=["default"], help="likewise")
    run.add_argument("--batch-size", type=int, default=256, help="samples per pass")
    run.add_argument("--workers", type=int, default=0, help="processes that read ahead")
    run.add_argument("--out", type=Path, help="folder for results.json, report.html and so on")
    run.add_argument("--cache", type=Path, help="folder that keeps features; OUT/features if not given")
    comparing = commands.add_parser("compare", help="paired differences between folders of results")
    comparing.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    comparing.add_argument("--plot", type=Path, help="PNG of the differences")
    report = commands.add_parser("report", help="write report.md and report.html anew")
    report.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    try:
        {"run": _run, "compare": _compare, "report": _report}[arguments.command](arguments)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    templates, classes = arguments.templates, arguments.classes
    if arguments.prompts is not None:
        if templates or classes:
            raise EvaluationError("--prompts holds templates and classes: leave out --templates and --classes")
        prompts = read_prompts(arguments.prompts)
        templates, classes = prompts.templates, prompts.classes or []
    wanted = EvalConfig().tasks if arguments.tasks is None else [name.strip() for name in arguments.tasks.split(",")]
    if arguments.tasks and "zeroshot" in wanted and not classes:
        raise EvaluationError("--tasks zeroshot needs --classes, or --prompts with classes")
    lacking = [name for name in wanted if arguments.tasks and name in TASKS and TASKS[name].labels]
    if lacking and arguments.label is None:
        raise EvaluationError(f"--tasks {lacking[0]} needs --label, the field of each sample's .json with its class")
    if arguments.workers < 0:
        raise EvaluationError(f"--workers {arguments.workers}: 0 or more is allowed")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)  # what can't be written should show now
    prompting = {} if templates is None else {"templates": templates}
    config = EvalConfig(arguments.label, wanted, classes, batch_size=arguments.batch_size, **prompting)
    splits = {
        name: Source(load_shards(find_shards(shards)), name)
        for name in ("train", "val", "test")
        if (shards := getattr(arguments, name)) is not None
    }
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    cache = arguments.cache or (None if arguments.out is None else arguments.out / "features")
    if several and cache is None:
        raise EvaluationError("several processes need --out or --cache, through which each gets what others computed")
    if several:
        dist.init_process_group("gloo")
    world = World.of_torch()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    try:
        scored = load_scored(arguments.encoder)
        settings = {"layers": arguments.layers, "poolings": arguments.poolings, "group": arguments.group}
        found = evaluate(
            scored, splits, config, device, arguments.workers, cache=cache, layers=tuple(arguments.layers),
            poolings=tuple(arguments.poolings), group=arguments.group, run=run_of(arguments.encoder), world=world,
        )  # fmt: skip
    finally:
        world.close()
        if several:
            dist.destroy_process_group()
    if world.rank > 0:
        return
    print(table(found.results))
    for name, why in found.skipped.items():
        print(f"{name}: left out, {why}")
    if arguments.out is not None:
        encoder = {"name": scored.name, "sha256": scored.fingerprint}
        subject = about(encoder, splits, config, **settings)
        write_evaluation(arguments.out, found.results, subject, found.predictions, found.page)
        print(f"\nreport      {arguments.out / 'report.html'}")


def run_of(encoder: str) -> Path | None:
    """The folder of the run that an encoder is of, if it is one's."""
    path = Path(encoder)
    if not path.exists():  # a hub id, which would be looked for where the command was given
        return None
    return next((each for each in (path, *path.resolve().parents[:3]) if (each / "metrics.jsonl").is_file()), None)


def _compare(arguments: argparse.Namespace) -> None:
    found = compare(arguments.folders)
    print(comparison_table(found))
    if arguments.plot is not None:
        plot(arguments.plot, found)
        print(f"\nplot        {arguments.plot}")


def _report(arguments: argparse.Namespace) -> None:
    for path in write_reports(arguments.folder):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
