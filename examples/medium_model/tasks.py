"""What the model is asked, about images and without any, and the text its perplexity is measured on.

The groups below are disjoint where they must be: `WORLD` and `TARGET_TEXT_HELD_OUT` are probes and in no retained row.
"""

from __future__ import annotations

import re
from dataclasses import replace

from space_peft.data.questions import DEFAULT_QUESTIONS


# There are no yes/no questions: this language model denies, in words, that a fox is an animal.
QUESTIONS = replace(DEFAULT_QUESTIONS, confirm=(), confirm_held_out=())

# World knowledge that SmolLM2-135M-Instruct has: the question, and what a right answer holds.
WORLD = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Italy?", "Rome"),
    ("Which planet is known as the Red Planet?", "Mars"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci"),
    ("What is the largest ocean on Earth?", "Pacific"),
    ("What is the chemical symbol for water?", "H2O"),
    ("How many days are there in a week?", "7"),
    ("What gas do plants absorb from the air?", "carbon dioxide"),
    ("What language is spoken in Brazil?", "Portuguese"),
)

# Retained rows without image: the completions are the model's own greedy answers.
GENERAL = (
    "What is the capital of Germany?",
    "Name three primary colors.",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "What is the boiling point of water?",
    "Write a short poem about the sea.",
    "What is photosynthesis?",
    "Who was Albert Einstein?",
    "Translate 'good morning' into French.",
    "What is the sum of 2 and 3?",
    "List four seasons of the year.",
    "What is the opposite of big?",
    "Explain gravity to a child.",
    "What do cows eat?",
    "Give me a tip for sleeping better.",
    "What is the largest country in the world?",
    "How many hours are in a day?",
    "What is a verb?",
    "Name a famous scientist.",
    "What is the currency of the United Kingdom?",
    "How does a bicycle work?",
    "What is the Great Wall of China?",
    "Tell me a fact about the moon.",
    "What is a computer program?",
    "Who wrote Hamlet?",
    "What is the chemical symbol for gold?",
    "What is an island?",
    "Why do we need to sleep?",
    "What is a triangle?",
    "How do airplanes fly?",
    "What is the square root of 16?",
    "What is democracy?",
    "Name two kinds of fruit.",
    "What is a library for?",
    "How is bread made?",
    "What is the Amazon?",
)
TARGET_TEXT = ("What is a {name}?", "Tell me about the {name}.", "Write a sentence with the word {name}.")
TARGET_TEXT_HELD_OUT = (
    "Describe a {name}.",
    "Where would I find a {name}?",
    "Give me a fact about the {name}.",
    "What does a {name} look like?",
)

# Charles Darwin, On the Origin of Species (1859), beginning of chapter I: in the public domain.
PASSAGE = (
    "When we look to the individuals of the same variety or sub-variety of our older cultivated plants and animals, one "
    "of the first points which strikes us, is, that they generally differ much more from each other, than do the "
    "individuals of any one species or variety in a state of nature. When we reflect on the vast diversity of the plants "
    "and animals which have been cultivated, and which have varied during all ages under the most different climates and "
    "treatment, I think we are driven to conclude that this greater variability is simply due to our domestic "
    "productions having been raised under conditions of life not so uniform as, and somewhat different from, those to "
    "which the parent-species have been exposed under nature."
)


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer holds what was expected, as words of its own, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", answer, re.IGNORECASE) is not None
