"""Sort a folder of pictures into classes of your own, by name alone: nothing is trained.

    python examples/zero_shot.py exported photos cat dog "hot air balloon"
    python examples/zero_shot.py exported photos cat dog --template "a photo of a {}" --template "a drawing of a {}"

The encoder is an export, a run, CLIP or SigLIP, by path or hub id; it needs embeddings of pictures and of captions.
500 photos of 640 x 480 take a ViT-S/16 at 224 pixels 1.5 minutes on a single CPU core. A line per picture: its class,
how much nearer than the second (in cosine), its path.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from data.errors import UserError
from eval.adapters.inputs import Inputs, embed_pictures
from eval.encoders import load_scored
from eval.zeroshot import check_templates, class_embeddings, unit_rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="export, run or model, by path or hub id")
    parser.add_argument("folder", type=Path, help="pictures, also in folders below it")
    parser.add_argument("classes", nargs="+", metavar="CLASS", help="two names or more")
    parser.add_argument("--template", action="append", help="prompt with {} for the class; may be given several times")
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args(argv)
    try:
        templates = given.template or ["a photo of a {}"]
        check_templates(templates, "--template")
        if len(set(given.classes)) < 2:
            raise UserError(f"CLASS: two different names are needed at least, got {given.classes}")
        scored = load_scored(given.encoder)
        inputs = Inputs(scored.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
        names = list(dict.fromkeys(given.classes))
        prompts = [[template.replace("{}", name) for template in templates] for name in names]
        classes = class_embeddings([inputs.embeddings("text", texts).cpu() for texts in prompts])
        paths, pictures = embed_pictures(inputs, given.folder, given.batch_size)
        cosines = unit_rows(pictures, "embeddings of the pictures") @ classes.T
    except (ValueError, OSError) as error:  # a UserError is a ValueError; so are embeddings without a direction
        print(f"error: {error}", file=sys.stderr)
        return 2
    best, chosen = cosines.topk(2, 1)
    for path, (first, second), place in zip(paths, best.tolist(), chosen[:, 0].tolist(), strict=True):
        print(f"{names[place]:20} {first - second:.3f}  {path}")
    counts = Counter(names[place] for place in chosen[:, 0].tolist())
    print("\n" + ", ".join(f"{name}: {counts[name]}" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
