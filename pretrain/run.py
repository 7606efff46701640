"""Pretrain, evaluate and export.

accelerate launch pretrain/run.py                                   # the embedded digits, minutes on 2 CPU cores
accelerate launch pretrain/run.py RECIPE.yaml key=value ...         # your own recipe, with changes
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers.utils.logging import disable_progress_bar

from data import digits
from data.errors import UserError
from eval.report import table, write_results
from eval.run import evaluate
from pretrain.checkpoint import load_encoder
from pretrain.config import Config, load_config, to_yaml
from pretrain.engine import open_source, pretrain
from pretrain.export import export

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
export/{image,text,audio}/, which load with transformers' AutoModel.from_pretrained.
Exit code: 0 when all is done, 2 for a mistake in the recipe, the shards or the checkpoint."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="pretrain/run.py", description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="YAML file; default: the digits recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the recipe")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    arguments = parser.parse_intermixed_args(argv)
    recipe, overrides = arguments.recipe, list(arguments.overrides)
    if recipe is not None and "=" in recipe:  # no recipe was given, only settings
        recipe, overrides = None, [recipe, *overrides]
    try:
        config = load_config(Path(recipe) if recipe else DEFAULT_RECIPE, overrides)
        if arguments.print_config:
            print(to_yaml(config), end="")
            return 0
        run(config)
    except (UserError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: Config) -> None:
    """Build the embedded data if asked for, train, evaluate, export, and say what came out."""
    if config.data.embedded == "digits":
        digits.build(Path(config.data.root))
    checkpoint = pretrain(config)
    out = Path(config.out)
    encoder, tokenizer = load_encoder(checkpoint)
    scores = ""
    if config.eval.label is not None:
        splits = {name: open_source(config, name) for name in ("train", "val", "test")}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        results = evaluate(encoder, tokenizer, splits, config.eval, device, config.data.workers)
        about = {"checkpoint": checkpoint.name, "samples": {name: len(source) for name, source in splits.items()}}
        write_results(out / "eval" / "results.json", results, about)
        scores = table(results) + "\n\n"
    folders = export(encoder.cpu(), tokenizer, out / "export")
    print("\n" + scores + closing_screen(out, checkpoint, list(folders)))


def closing_screen(out: Path, checkpoint: Path, modalities: Sequence[str]) -> str:
    """What lies where, and the commands to copy next."""
    first, results = modalities[0], out / "eval" / "results.json"
    return f"""\
run         {out}
checkpoint  {checkpoint}
metrics     {out / "metrics.jsonl"}
results     {results if results.exists() else "none: eval.label is null"}
export      {out / "export"}/{{{",".join(modalities)}}}

next
  load      python -c "from transformers import AutoModel; print(AutoModel.from_pretrained('{out / "export" / first}'))"
  export    python pretrain/export.py {checkpoint} EMPTY_FOLDER
  resume    start the same command again: it goes on from the newest checkpoint
"""


if __name__ == "__main__":
    # Few mel bins leave some low filters narrower than a bin of the transform; ASTFeatureExtractor has the same.
    warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
    disable_progress_bar()  # saving and loading take milliseconds a file
    sys.exit(main())
