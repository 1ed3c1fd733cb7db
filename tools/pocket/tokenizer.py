"""Trains the built-in model's tokenizer: byte-level BPE, so any text survives a round trip.

The split keeps what Python repeats in one piece: a line break with the indentation after it, a
word with the space, dot or underscore before it, a run of punctuation. Digits stand alone.
Nothing is added around a text; `<|endoftext|>` separates documents and ends a generation.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.pocket.corpus import documents

EOS, PAD = "<|endoftext|>", "<|pad|>"
SPLIT = r"\s*\n[\n ]*|[ ._]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": EOS,
    "pad_token": PAD,
    "bos_token": None,
    "unk_token": None,
    "model_max_length": 512,
    "clean_up_tokenization_spaces": False,
    "add_prefix_space": False,
}


def train(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=True,
    )
    # Tests are numerous and repeat themselves: the vocabulary is learned from the library alone.
    texts = [d.text for d in documents() if not d.held_out and not d.is_test]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("moeinf/pocket"))
    parser.add_argument("--vocab-size", type=int, default=3072)
    args = parser.parse_args()
    tokenizer = train(args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


if __name__ == "__main__":
    main()
