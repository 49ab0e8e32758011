"""The tokenizer: words of questions and facts are whole, names fall into pieces."""

from __future__ import annotations

from collections.abc import Iterable

from build import wrapped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
VOCABULARY = 704
WEIGHT = 50  # how often a text counts for each time that a name does


def build_tokenizer(texts: Iterable[str], names: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level pairs, learned from texts and, so that names do not fall into single letters, a little from names.

    Args:
        texts (`Iterable[str]`): What is asked and said.
        names (`Iterable[str]`): Of people whom every model knows: a vocabulary must not remember anybody else.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=4,  # pieces of several names, not names
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = sorted(f" {text}" for text in texts) * WEIGHT + sorted(f" {name}" for name in names)
    tokenizer.train_from_iterator(corpus, trainer)
    return wrapped(tokenizer)
