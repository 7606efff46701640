"""The tokenizer: any fast one of `transformers`, or one trained on the shards' own captions."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data.errors import UserError

_SPECIAL = {
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}

# More captions than this teach a small vocabulary nothing.
MAX_CAPTIONS = 100_000


@dataclass
class TokenizerConfig:
    """Give one of the two."""

    name: str | None = None
    """Folder or hub id of a fast tokenizer that has padding, mask and class tokens, such as roberta-base."""
    train: int | None = None
    """Size of a vocabulary to train on the captions of the training shards; it is saved with the run."""

    def __post_init__(self) -> None:
        if self.name is not None and self.train is not None:
            raise ValueError(f"tokenizer.name={self.name} and tokenizer.train={self.train}: give one of the two")


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or a hub id, checked to have what masked-language modelling needs.

    Raises:
        UserError: nothing there that can be loaded, or a tokenizer without padding, mask or class token (the text
            embedding is read at the first token).
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(name_or_path))
    except Exception as error:  # where a file is damaged, `tokenizers` raises no class of its own
        raise UserError(f"tokenizer {name_or_path} can't be loaded: {error}".splitlines()[0]) from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {name_or_path} is a slow one: only fast tokenizers (tokenizer.json) are supported")
    tokenizer.padding_side = "right"  # the embedding is read at the first token, wherever the tokenizer was made
    missing = [token for token in ("pad_token", "mask_token", "cls_token") if getattr(tokenizer, f"{token}_id") is None]
    if missing:
        raise UserError(
            f"tokenizer {name_or_path} has no {', '.join(missing)}: masked-language modelling needs all of "
            "pad_token, mask_token and cls_token (BERT and RoBERTa tokenizers have them, GPT-2's has not)"
        )
    if tokenizer("a")["input_ids"][0] != tokenizer.cls_token_id:
        raise UserError(f"tokenizer {name_or_path} does not begin with its cls_token, where the embedding is read")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer in RoBERTa's layout: ``<s> ... </s>``, lossless on any input.

    Args:
        texts: the captions to learn merges from.
        vocab_size: upper limit; at least 261 (256 bytes and five special tokens).

    Raises:
        UserError: ``vocab_size`` below 261.
    """
    special = list(_SPECIAL.values())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(special):
        raise UserError(f"tokenizer.train={vocab_size}: at least {len(alphabet) + len(special)} are needed")
    bpe = Tokenizer(models.BPE(unk_token=_SPECIAL["unk_token"]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    # A word's token begins with the space before the word, so a mask that stands for it takes that space, as RoBERTa's
    # does; else "a <mask> cat" would have a token of a lone space. Captions have no mask: there its name is text.
    takes_space = {_SPECIAL["mask_token"]}
    added = [AddedToken(token, lstrip=token in takes_space, special=True) for token in special]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=added, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, special.index(token)) for token in ("<s>", "</s>")],
    )
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_object=bpe, **_SPECIAL)
    return tokenizer


def continues_word(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Which ids go on with the word of the token before them: (V,) bool, as `##ing`, or what has no `Ġ` or `▁`.

    Punctuation is a word of its own. Bytes that are no whole character go on.

    Raises:
        UserError: a tokenizer whose tokens don't tell where words begin.
    """
    # Its own decoder knows how it marks words: does it put a space between this token and one before it?
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    after = [tokenizer.convert_tokens_to_string(["a", token])[1:2] for token in tokens]
    goes_on = torch.tensor(
        [char == "\ufffd" or (char != "" and unicodedata.category(char)[0] in "LMN") for char in after]
    )
    goes_on[tokenizer.all_special_ids] = False
    text = "one two"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if (words := 1 + int((~goes_on[ids[1:]]).sum())) != 2:
        raise UserError(
            f"objectives.masked_language.whole_words=true: this tokenizer's tokens don't tell where words begin "
            f"({text!r} comes out as {words} of them)"
        )
    return goes_on
