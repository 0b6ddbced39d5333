"""A tokenizer made on the spot, in the form of the published T5 ones, so that the demo needs no download."""

from __future__ import annotations

import json
import string
from pathlib import Path

# Ids 0, 1, 2 as in T5: padding, end of sequence, unknown.
SPECIAL_PIECES = ("<pad>", "</s>", "<unk>")
WORD_START = "\u2581"  # stands for the space before a word
WORDS = """
a and the of in on with at to is it as by from cat dog ferret log water snow tree sky sea light camera low angle wide
close up shot slow motion red blue green golden bright dark soft warm morning night forest river mountain street city
rain wind leaves grass bird fish runs plays leaps walks swims flies blurry distorted worst quality
"""


def vocabulary() -> list[tuple[str, float]]:
    """Return (piece, log-probability) pairs: words, syllable-like pairs of letters, and single characters as a floor."""
    letters = string.ascii_lowercase
    pairs = [first + second for first in letters for second in "aeiou"]
    singles = [*string.ascii_letters, *string.digits, *string.punctuation, WORD_START]
    words = [WORD_START + word for word in WORDS.split()]
    scored = [(piece, -4.0) for piece in words] + [(piece, -8.0) for piece in pairs] + [(p, -10.0) for p in singles]
    return [(piece, 0.0) for piece in SPECIAL_PIECES] + list(dict(scored).items())


def write_tokenizer(folder: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json into ``folder`` (made when missing); return the vocabulary size."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors  # noqa: PLC0415
    from tokenizers.models import Unigram  # noqa: PLC0415

    pieces = vocabulary()
    tokenizer = Tokenizer(Unigram(pieces, unk_id=SPECIAL_PIECES.index("<unk>"), byte_fallback=False))
    metaspace = pre_tokenizers.Metaspace(replacement=WORD_START, prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement=WORD_START, prepend_scheme="always", split=True)
    end = ("</s>", SPECIAL_PIECES.index("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[end]
    )
    tokenizer.add_special_tokens(list(SPECIAL_PIECES))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "additional_special_tokens": [],
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return len(pieces)
