"""Search a folder of pictures by a sentence or by another picture; the index is built once.

    python examples/search.py build exported photos photos.index
    python examples/search.py query photos.index "a dog on a beach"
    python examples/search.py query photos.index --picture dog.jpg --top 5

The encoder is an export, a run, CLIP or SigLIP, by path or hub id; it needs embeddings of what is searched and of what
it is searched by. With a ViT-S/16 at 224 pixels an index of 500 photos of 640 x 480 takes 1.5 minutes on a single CPU
core, a query 5 seconds, nearly all of them for loading. Neighbours are exact: by faiss if it is installed (``pip
install faiss-cpu``), else by a plain matrix product. The index is one file in safetensors: vectors of length 1, the
pictures' paths, and which encoder made them.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.decode import DecodeError, decode_image
from data.errors import UserError
from eval.adapters.inputs import Inputs, embed_pictures
from eval.encoders import load_scored
from eval.zeroshot import unit_rows


def build(given: argparse.Namespace) -> None:
    """Embed all pictures, and write the index."""
    if not given.index.parent.is_dir():
        raise UserError(f"{given.index}: there is no folder {given.index.parent}")
    name = str(Path(given.encoder).resolve()) if Path(given.encoder).exists() else given.encoder
    inputs = load(name)
    paths, embeddings = embed_pictures(inputs, given.folder)
    vectors = unit_rows(embeddings, "embeddings of the pictures").float()
    about = {"encoder": name, "sha256": inputs.scored.fingerprint}
    about["paths"] = json.dumps([str(path.resolve()) for path in paths])
    save_file({"vectors": vectors}, given.index, metadata=about)
    print(f"{given.index}: {len(paths)} pictures, {vectors.shape[1]} numbers each")


def query(given: argparse.Namespace) -> None:
    """Print the nearest pictures, nearest first."""
    if (given.text is None) == (given.picture is None):
        raise UserError("query: give either TEXT or --picture")
    if given.top < 1:
        raise UserError(f"--top {given.top}: 1 or more is allowed")
    try:
        with safe_open(given.index, framework="pt") as file:
            about, vectors = file.metadata() or {}, file.get_tensor("vectors")
    except SafetensorError as error:
        raise UserError(f"{given.index}: no index that `build` made: {error}") from error
    if lacking := [key for key in ("encoder", "sha256", "paths") if key not in about]:
        raise UserError(f"{given.index}: no index that `build` made: its metadata have no {lacking[0]}")
    inputs = load(about["encoder"])
    if inputs.scored.fingerprint != about["sha256"]:
        raise UserError(
            f"{given.index}: {about['encoder']}, or what reads its inputs, has changed since: build it again"
        )
    if given.text is not None:
        wanted = inputs.embeddings("text", [given.text])
    else:
        try:
            wanted = inputs.embeddings("image", [decode_image(given.picture.read_bytes())])
        except DecodeError as error:
            raise UserError(f"{given.picture}: {error}") from error
    scores, places = nearest(unit_rows(wanted.cpu(), "embedding of the query").float(), vectors, given.top)
    paths = json.loads(about["paths"])
    for score, place in zip(scores, places, strict=True):
        print(f"{score:.4f}  {paths[place]}")


def load(name: str) -> Inputs:
    """An encoder, on a GPU if there is one."""
    return Inputs(load_scored(name).to(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def nearest(wanted: Tensor, vectors: Tensor, top: int) -> tuple[list[float], list[int]]:
    """Cosines and places of the ``top`` rows of ``vectors`` (n, E) nearest to ``wanted`` (1, E)."""
    top = min(top, len(vectors))
    if importlib.util.find_spec("faiss") is not None:
        faiss = importlib.import_module("faiss")
        index = faiss.IndexFlatIP(vectors.shape[1])  # from a million pictures on, an approximate one goes here
        index.add(vectors.numpy())
        scores, places = index.search(wanted.numpy(), top)
        return scores[0].tolist(), places[0].tolist()
    found = (wanted @ vectors.T)[0].topk(top)
    return found.values.tolist(), found.indices.tolist()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("build", help="embed a folder of pictures")
    making.add_argument("encoder", help="export, run or model, by path or hub id")
    making.add_argument("folder", type=Path, help="pictures, also in folders below it")
    making.add_argument("index", type=Path, help="file to be written")
    making.set_defaults(run=build)
    asking = commands.add_parser("query", help="print the nearest pictures")
    asking.add_argument("index", type=Path)
    asking.add_argument("text", nargs="?", metavar="TEXT")
    asking.add_argument("--picture", type=Path, metavar="FILE")
    asking.add_argument("--top", type=int, default=10, help="how many")
    asking.set_defaults(run=query)
    given = parser.parse_args(argv)
    try:
        given.run(given)
    except (ValueError, OSError) as error:  # a UserError is a ValueError; so are embeddings without a direction
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
