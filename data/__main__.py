"""Build, check, describe and look through shards: ``python -m data COMMAND --help``."""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data import build, stats, validate
from data.errors import UserError
from data.index import build_index, find_shards, index_path, load_shard, write_index

EPILOG = """\
  python -m data build --from photos.csv --out shards/photos      make shards, and an index beside each
  python -m data validate 'shards/photos/*.tar' --decode           is everything readable?
  python -m data stats 'shards/photos/*.tar' --plot photos.png     what is in it?
  python -m data index 'elsewhere/*.tar'                           index shards that were made elsewhere
  python -m data order recipe.yaml --start 100 --steps 2           which samples does training see when?"""


def add_index(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``index``."""
    parser.add_argument("shards", nargs="+", help="paths, globs or ranges of local tars")
    parser.add_argument("--force", action="store_true", help="index anew what has an index")


def run_index(arguments: argparse.Namespace) -> int:
    """Index shards that have none; say what is in each. All are tried, broken ones named at the end."""
    failed = []
    for location in find_shards(arguments.shards):
        try:
            if arguments.force or not index_path(location).exists():
                write_index(build_index(location))
            shard = load_shard(location)
        except UserError as error:
            failed.append(str(error))
            continue
        members = ", ".join(f"{count} .{extension}" for extension, count in shard.members.items())
        print(f"{location}: {shard.samples} samples: {members}")
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


def add_order(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``order``."""
    parser.add_argument("recipe", type=Path, help="YAML file of a training run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the recipe")
    parser.add_argument("--start", type=int, default=0, metavar="G", help="first global step, from 0")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="number of steps")
    parser.add_argument("--world", type=int, default=1, metavar="W", help="show which of W ranks reads what")
    parser.add_argument("--workers", type=int, default=0, metavar="K", help="show which of K workers reads what")


def run_order(arguments: argparse.Namespace) -> int:
    """Per global step, the keys of its rows in order: of the run in the recipe's ``out``, or of one that begins now.

    Nothing is decoded: where a sample turns out to be unusable, training takes one of a later step of its lane.
    """
    # Here, since a recipe's parts take seconds to import, which the other commands need not wait for.
    from data.stream import make_order, open_train, read_state
    from pretrain.checkpoint import find_last
    from pretrain.config import load_config

    if arguments.start < 0 or arguments.steps < 1 or arguments.world < 1 or arguments.workers < 0:
        raise UserError("--start and --workers must be 0 or more, --steps and --world 1 or more")
    config = load_config(arguments.recipe, arguments.overrides)
    sources = open_train(config.data)
    checkpoint = find_last(Path(config.out) / "checkpoints")
    # Where the data were exchanged during the run, another pass over them began.
    began, run_pass = (0, 0) if checkpoint is None else read_state(checkpoint)
    if arguments.start < began:
        raise UserError(f"--start {arguments.start}: the run has other data since step {began}")
    order = make_order(sources, config.data, config.seed, config.train.batch_size, run_pass)
    if order.lanes % arguments.world:
        raise UserError(f"--world {arguments.world}: must divide the {order.lanes} lanes of a batch")
    share = order.lanes // arguments.world
    for step in range(arguments.start, arguments.start + arguments.steps):
        if order.steps is not None and step - began >= order.steps:
            raise UserError(f"step {step}: max_epochs of all sources end at step {began + order.steps}")
        for rank in range(arguments.world):
            who = f" rank {rank}" if arguments.world > 1 else ""
            who += f" worker {step % arguments.workers}" if arguments.workers else ""
            keys = []
            for slot in order.slots(step - began, range(rank * share, (rank + 1) * share)):
                place, source = order.place(slot), sources[slot.source]
                name = "" if len(sources) == 1 else f"{source.name}:"
                key = name + source.sample(place.shard, place.sample).key
                keys.append(json.dumps(key) if any(map(str.isspace, key)) else key)
            print(f"step {step}{who}: {' '.join(keys)}")
    return 0


# Command -> what it does, its arguments, what runs it.
COMMANDS = {
    "build": (
        "make shards from a CSV or JSONL file, a folder or a Hugging Face data set",
        build.add_arguments,
        build.run,
    ),
    "index": ("index shards that were made elsewhere", add_index, run_index),
    "validate": ("find what is wrong in shards", validate.add_arguments, validate.run),
    "stats": ("count and plot what is in shards", stats.add_arguments, stats.run),
    "order": ("show which samples training sees at which step", add_order, run_order),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 for fine, 1 for damage that was found, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m data",
        description="Make shards and look into them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_arguments, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."))
    # argparse takes the settings after the recipe, but not those that stand behind an option.
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "order":
        arguments.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # keys of a tar may hold any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return COMMANDS[arguments.command][2](arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough; nothing more may be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
