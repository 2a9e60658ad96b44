"""A run's tokenizer as the `tokenizers` library has it: the same ids for every text, from any program that reads tokenizer.json."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from andromeda.data.encoders.bpe import byte_of_character
from andromeda.data.encoders.unigram import SPACE
from andromeda.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

PADDING = ("<|pad|>", "<pad>", "[PAD]")
"""Special tokens that serve for padding where the tokenizer has one; else the document separator does."""
NEVER = -1e9
"""Score of pieces that text must not turn into (special tokens, the names of bytes): every other spelling is likelier."""
UNKNOWN_PENALTY = 10.0
"""What SentencePiece takes from the least score for a character that is no piece."""


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as a `tokenizers.Tokenizer` that places the token first with which every text begins in training."""
    from tokenizers import AddedToken, processors

    fast = {"bpe": _as_it_is, "sentencepiece_bpe": _as_it_is, "unigram": _unigram, "bytes": _bytes}[tokenizer.kind](tokenizer)
    for name, number in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1]):
        # The separator has a second name where another project's tokenizer calls it otherwise.
        if fast.id_to_token(number) in (None, name):
            fast.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    begin = token_name(tokenizer, tokenizer.bos)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B:1", special_tokens=[(begin, tokenizer.bos)]
    )
    return fast


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """Name of a special token."""
    return next(name for name, number in tokenizer.special_tokens.items() if number == token)


def padding_id(tokenizer: Tokenizer) -> int:
    """Id of the token that fills up sequences: its own where there is one, else the document separator."""
    return next((tokenizer.special_tokens[name] for name in PADDING if name in tokenizer.special_tokens), tokenizer.eos)


def tokenizer_files(tokenizer: Tokenizer, context: int, chat_template: str = "") -> dict[str, bytes]:
    """Content of the folder's tokenizer files by name. context: tokens that the model reads."""
    end = token_name(tokenizer, tokenizer.eos)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": token_name(tokenizer, tokenizer.bos),
        "eos_token": end,
        "pad_token": next((name for name in PADDING if name in tokenizer.special_tokens), end),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        # The name of a special token in a text is text. A chat template writes special tokens by name, and needs them read.
        "split_special_tokens": not chat_template,
    }
    files = {
        "tokenizer.json": fast_tokenizer(tokenizer).to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    return files | ({"chat_template.jinja": chat_template.encode()} if chat_template else {})


def _as_it_is(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    import tokenizers

    return tokenizers.Tokenizer.from_str(tokenizer.model_file.decode())


def _bytes(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A byte-level BPE that never merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    fast = tokenizers.Tokenizer(models.BPE(vocab=byte_of_character(), merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    return fast


def _unigram(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A unigram model over bytes, each byte of a text being a character of GPT-2's byte-level alphabet.

    SentencePiece spells a character that is no piece in bytes, at the cost of the least score less 10: here its first byte costs
    that and the others nothing. A piece thus never begins inside a character, and no name of a byte can be read from a text.
    """
    import tokenizers
    from sentencepiece import SentencePieceProcessor
    from tokenizers import decoders, models, pre_tokenizers

    model = SentencePieceProcessor(model_proto=tokenizer.model_file)
    letter = {byte: character for character, byte in byte_of_character().items()}
    ids = range(model.vocab_size())
    spelled = {i: model.id_to_piece(i) for i in ids}
    ordinary = {
        i: "".join(letter[b] for b in spelled[i].replace(SPACE, " ").encode())
        for i in ids
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    }
    unseen = min(model.get_score(i) for i in ordinary) - UNKNOWN_PENALTY
    used = set(ordinary.values())
    pieces: list[tuple[str, float]] = []
    for i in ids:
        byte = int(spelled[i][3:5], 16) if model.is_byte(i) else -1
        if i in ordinary:
            pieces.append((ordinary[i], model.get_score(i)))
        elif byte >= 0 and letter[byte] not in used:
            pieces.append((letter[byte], 0.0 if 0x80 <= byte < 0xC0 else unseen))
        else:
            pieces.append((spelled[i], NEVER))
    fast = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=model.unk_id(), byte_fallback=False))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    return fast
