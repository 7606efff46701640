from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data.text import TokenizerConfig, load_tokenizer, train_tokenizer
from data.transforms import TextView, make_field
from tests.samples import CAPTIONS, tokenizer

UNICODE = [
    "größe",
    "日本語のキャプション",
    "🐈‍⬛ and 👩🏽‍🚀",
    "e\u0301 is not é",
    "\x00\x01\x7f\ufeff\u202e",
    "two  spaces\tand\nlines",
    "don't stop . , ! here",
    "x" * 300,
]


@pytest.mark.parametrize("text", UNICODE)
def test_any_text_comes_back(text: str) -> None:
    ids = tokenizer()(text)["input_ids"]
    assert tokenizer().unk_token_id not in ids
    assert tokenizer().decode(ids, skip_special_tokens=True) == f" {text}"


@pytest.mark.parametrize("token", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
def test_a_special_tokens_name_in_a_caption_is_text(token: str, tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    for each in (tokenizer(), load_tokenizer(tmp_path)):
        ids = make_field(TextView(), [f"a {token} b"], each).x[0].tolist()
        assert [i for i in ids if i in each.all_special_ids] == [each.cls_token_id, each.sep_token_id]
        assert each.decode(ids[1:-1]) == f" a {token} b"


def test_special_tokens_are_robertas() -> None:
    ids = {name: getattr(tokenizer(), f"{name}_token_id") for name in ("cls", "pad", "sep", "unk", "mask")}
    assert ids == {"cls": 0, "pad": 1, "sep": 2, "unk": 3, "mask": 4}
    assert sorted(tokenizer().all_special_ids) == [0, 1, 2, 3, 4]
    encoded = tokenizer()("a cat")["input_ids"]
    assert (encoded[0], encoded[-1]) == (0, 2)
    assert not set(encoded[1:-1]) & {0, 1, 2, 3, 4}
    assert tokenizer()("a", "cat")["input_ids"].count(2) == 3
    assert tokenizer()("")["input_ids"] == [0, 2]


def test_padding_is_at_the_end() -> None:
    encoded = tokenizer()(["a cat", "the dog barks at a cat"], padding=True)
    mask = encoded["attention_mask"]
    assert mask[0] == sorted(mask[0], reverse=True)
    assert 0 in mask[0]
    assert encoded["input_ids"][0][-1] == tokenizer().pad_token_id


def test_the_size_is_an_upper_limit_that_merges_fill() -> None:
    captions = [f"{a} {b}" for a in CAPTIONS for b in CAPTIONS]
    assert len(train_tokenizer(captions, 261)) == 261
    assert len(train_tokenizer(captions, 280)) == 280
    large = train_tokenizer(captions, 100_000)
    assert 280 < len(large) < 500
    assert len(large(captions[7])["input_ids"]) < len(train_tokenizer(captions, 261)(captions[7])["input_ids"])


def test_training_is_deterministic() -> None:
    assert train_tokenizer(CAPTIONS, 280).get_vocab() == train_tokenizer(iter(CAPTIONS), 280).get_vocab()


@pytest.mark.parametrize("size", [0, 260])
def test_a_vocabulary_that_lacks_bytes_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"tokenizer\.train={size}: at least 261"):
        train_tokenizer(CAPTIONS, size)


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded(UNICODE + CAPTIONS)["input_ids"] == tokenizer()(UNICODE + CAPTIONS)["input_ids"]
    assert (len(loaded), loaded.all_special_ids) == (len(tokenizer()), tokenizer().all_special_ids)
    assert (loaded.pad_token_id, loaded.mask_token_id, loaded.cls_token_id) == (1, 4, 0)
    assert loaded.padding_side == "right"


def test_a_mask_takes_the_space_before_it(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    for each in (tokenizer(), load_tokenizer(tmp_path)):
        before, after = (each(word, add_special_tokens=False)["input_ids"] for word in ("rain", "cat"))
        expected = [each.cls_token_id, *before, each.mask_token_id, *after, each.sep_token_id]
        for text in ("rain <mask> cat", "rain<mask> cat", "rain  <mask> cat"):
            assert each(text)["input_ids"] == expected


def test_a_tokenizer_that_was_saved_when_masks_left_the_space_loads_as_it_was(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    saved = path.read_text()
    assert saved.count('"lstrip": true') == 1
    path.write_text(saved.replace('"lstrip": true', '"lstrip": false'))
    loaded = load_tokenizer(tmp_path)
    assert loaded(UNICODE + CAPTIONS)["input_ids"] == tokenizer()(UNICODE + CAPTIONS)["input_ids"]
    assert len(loaded("rain <mask> cat")["input_ids"]) == len(tokenizer()("rain <mask> cat")["input_ids"]) + 1


END = "<|endoftext|>"


def gpt2(**special: str) -> PreTrainedTokenizerBase:
    """In GPT-2's layout: ``<|endoftext|>`` begins and ends text, and there is no other special token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe.train_from_iterator(CAPTIONS, trainers.BpeTrainer(vocab_size=300, special_tokens=[END], show_progress=False))
    made: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, **special
    )
    return made


def test_a_tokenizer_that_lacks_tokens_is_refused_by_their_names(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="none has no pad_token, mask_token, cls_token: "):
        load_tokenizer(tmp_path / "none")
    gpt2(pad_token=END, cls_token=END).save_pretrained(tmp_path / "mask")
    with pytest.raises(ValueError, match="mask has no mask_token: "):
        load_tokenizer(tmp_path / "mask")


def test_give_one_of_name_and_train() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.name=roberta-base and tokenizer\.train=300: give one"):
        TokenizerConfig(name="roberta-base", train=300)
    assert TokenizerConfig(name="roberta-base").train is None
    assert TokenizerConfig(train=300).name is None
