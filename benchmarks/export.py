"""How long an export takes, and how large it is: every folder written, and all verified in a process of their own.

    python benchmarks/export.py                     # minutes on 2 CPU cores; the figures of benchmarks/README.md
    python benchmarks/export.py --presets tiny      # a quick look

Random encoders of images of 224 px, captions of 64 tokens and 10.24 s of sound. The last line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # launched by path: the project's root, not this folder, is where packages are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers.utils.logging import disable_progress_bar

from data.text import train_tokenizer
from data.transforms import Views
from objectives.pretraining import ObjectivesConfig, Pretraining
from pretrain.exports.folders import folders_of
from pretrain.exports.subject import Subject
from pretrain.exports.verify import random_samples, verify
from pretrain.model.encoder import Encoder
from pretrain.model.tokenizers import PRESETS, ModelConfig, Vocabulary


def measure(preset: str) -> dict[str, Any]:
    """Megabytes and seconds of each folder's writing, and seconds of verifying all."""
    tokenizer = train_tokenizer(["a caption"], 300)
    special = tuple(sorted(tokenizer.all_special_ids))
    vocabulary = Vocabulary(len(tokenizer), tokenizer.pad_token_id, tokenizer.mask_token_id, special)
    shape: Any = PRESETS[preset]
    encoder = Encoder(ModelConfig(**shape), Views(), vocabulary).eval()
    objectives = Pretraining(encoder, ObjectivesConfig()).objectives.state_dict()
    subject = Subject(encoder, tokenizer, objectives)
    folders, written, sizes = folders_of(subject), {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        for name, folder in folders.items():
            (out / name).mkdir(parents=True)
            before = time.perf_counter()
            folder.write(subject, out / name)
            written[name] = time.perf_counter() - before
            sizes[name] = sum(path.stat().st_size for path in (out / name).iterdir() if path.is_file()) / 1e6
        before = time.perf_counter()
        differences = verify(subject, out, folders, random_samples(encoder.views))
        verified = time.perf_counter() - before
    parameters = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    print(f"{preset}: {parameters:.1f} M parameters\n{'folder':16} {'MB':>8} {'seconds':>8} {'difference':>11}")
    for name in folders:
        print(f"{name:16} {sizes[name]:8.1f} {written[name]:8.2f} {differences[name]:11.1e}")
    print(f"{'all':16} {sum(sizes.values()):8.1f} {sum(written.values()):8.2f} {max(differences.values()):11.1e}")
    print(f"verified in {verified:.1f} s\n", flush=True)
    return {
        "megabytes": round(sum(sizes.values()), 1),
        "write_seconds": round(sum(written.values()), 2),
        "verify_seconds": round(verified, 1),
        "largest_difference": max(differences.values()),
    }


def main() -> None:
    """Print a table per size and the JSON line."""
    parser = argparse.ArgumentParser(description="Time exports.")
    parser.add_argument("--presets", nargs="+", default=["tiny", "base"], choices=PRESETS, help="sizes")
    arguments = parser.parse_args()
    disable_progress_bar()
    print(f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(json.dumps({preset: measure(preset) for preset in arguments.presets}))


if __name__ == "__main__":
    main()
