"""Guess hidden words with an export's language-model head, as it is and after a few captions of one's own.

    python examples/fill_mask.py runs/digits/export --train 'shards/digits/train-*.tar' \\
        --test 'shards/digits/test-*.tar' --text "someone wrote the <mask> four"

Plain `transformers`, with its `Trainer`; twenty seconds on a single CPU core. Scored is the share of
tokens of other captions that are guessed, each hidden in turn; beside it the same architecture, trained on the same
few captions from scratch.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from few_labels import TEXTS, draw, fit, part, print_scores, read, reader, run, scratch
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling


@torch.inference_mode()
def guessed(model: Any, tokenizer: Any, captions: Sequence[str]) -> float:
    """Share of the tokens, special ones aside, that a model ranks first where they are hidden one at a time."""
    model.eval()
    right = total = 0
    for caption in captions:
        encoded = tokenizer(caption, truncation=True, return_tensors="pt", return_special_tokens_mask=True)
        places = (encoded["special_tokens_mask"][0] == 0).nonzero()[:, 0]
        rows = encoded["input_ids"].repeat(len(places), 1)
        each = torch.arange(len(places))
        wanted = rows[each, places]
        rows[each, places] = tokenizer.mask_token_id
        found = model(input_ids=rows).logits[each, places].argmax(1)
        right, total = right + int((found == wanted).sum()), total + len(places)
    return right / total


@torch.inference_mode()
def guesses(model: Any, tokenizer: Any, text: str, top: int = 3) -> str:
    """The likeliest words for the first ``<mask>`` of a text, with their probabilities."""
    model.eval()
    encoded = tokenizer(text, return_tensors="pt")
    places = (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
    if len(places) == 0:
        raise ValueError(f"--text {text!r}: {tokenizer.mask_token} is needed where a word is hidden")
    best = model(**encoded).logits[0, places[0]].softmax(0).topk(top)
    return ", ".join(
        f"{tokenizer.decode([token]).strip()} {100 * share:.0f} %"
        for share, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )


def compare(given: argparse.Namespace) -> None:
    """The export as it is, the export trained, and scratch trained."""
    folder = part(given.export, "text/masked_lm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn = draw(read(given.train, TEXTS, None), given.captions, given.seed)
    trained = set(drawn)
    captions = [sample.text() for sample in read(given.test, TEXTS, None) if sample not in trained]
    if not captions:
        raise ValueError("--test: no caption is left that is not trained on")
    rows = [tokenizer(sample.text(), truncation=True) for sample in drawn]
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    if given.text is not None:
        print(f"{given.text}: {guesses(model, tokenizer, given.text)}\n")
    scores = {"export as it is": [guessed(model, tokenizer, captions)]}
    torch.manual_seed(given.seed)
    for name, start in {"export": model, "scratch": scratch(AutoModelForMaskedLM, folder)}.items():
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
        fit(start, rows, given, given.learning_rate, given.seed, data_collator=collator)
        scores[name] = [guessed(start.cpu(), tokenizer, captions)]
    print(f"{given.captions} captions, {given.steps} steps; guessed tokens of {len(captions)} other captions\n")
    print_scores(scores, ["top-1"])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for users' mistakes."""
    made = reader(__doc__)
    made.add_argument("--captions", type=int, default=20, help="how many distinct captions to train on (%(default)s)")
    made.add_argument("--steps", type=int, default=150)
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--learning-rate", type=float, default=1e-3)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--text", help="show guesses for its <mask>, by the export as it is")
    return run(compare, made, argv)


if __name__ == "__main__":
    sys.exit(main())
