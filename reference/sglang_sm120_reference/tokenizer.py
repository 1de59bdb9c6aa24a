"""A byte-level BPE tokenizer for the checkpoints written here.

SGLang renders DeepSeek-V4 chats with the model's own encoding, not with a chat template, so each marker of
that encoding is one token here, and nothing is added to a text by itself (no automatic BOS).
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)
"""Markers of the DeepSeek-V4 encoding that a decoder may skip; ids count from 0 in this order."""

MARKUP_TOKENS = ("<think>", "</think>", "｜DSML｜")
"""Markers that belong to the visible text: single ids, but kept when special tokens are skipped."""

_WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by "
    "word but not what all were we when your can said there use an each which she do how their if will up "
    "other about out many then them these so some her would make like him into time has look two more write "
    "go see number no way could people my than first water been call who oil its now find long down day did "
    "get come made may part over new sound take only little work know place year live me back give most very "
    "after thing our just name good sentence man think say great where help through much before line right "
    "too mean old any same tell boy follow came want show also around form three small set put end does"
).split()


SMALLEST = len(SPECIAL_TOKENS) + len(MARKUP_TOKENS) + 256
"""Ids of the smallest vocabulary: the markers and the bytes."""


def vocabulary(vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary (all ids 0 .. vocab_size - 1, markers included) and merges of the BPE model.

    Ids left over when the word list is used up are plain entries that no text encodes to, so that every id
    the model can sample decodes. Raises ValueError below the 256 bytes plus markers.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fixed = [*SPECIAL_TOKENS, *MARKUP_TOKENS, *alphabet]
    if vocab_size < SMALLEST:
        raise ValueError(f"vocab_size is {vocab_size}: use at least {SMALLEST}, the bytes and the markers")
    vocab = {token: i for i, token in enumerate(fixed)}
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        merged = "Ġ"  # the byte-level spelling of a space
        for letter in word:
            longer = merged + letter
            if longer not in vocab and len(vocab) < vocab_size:
                vocab[longer] = len(vocab)
                merges.append((merged, letter))
            merged = longer
    while len(vocab) < vocab_size:
        vocab[f"unused{len(vocab)}"] = len(vocab)
    return vocab, merges


def build(vocab_size: int) -> Tokenizer:
    """The tokenizer with exactly `vocab_size` ids."""
    vocab, merges = vocabulary(vocab_size)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in MARKUP_TOKENS])
    return tokenizer


def write(out: Path, vocab_size: int, max_positions: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `out`."""
    build(vocab_size).save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "pad_token": SPECIAL_TOKENS[2],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
