"""The questions the embedded model was taught, split as an erasure needs them.

All of them are within the embedded model's vocabulary. Which group a question is in matters to the *erasure* only:
held-out questions are never used by refinement or by `SpaceTrainer`, so they measure generality.
"""

from ..questions import QuestionSet


YES, NO = "yes", "no"

DEMO_QUESTIONS = QuestionSet(
    naming=("what is this?", "what does the picture show?", "name the thing in the image."),
    naming_held_out=(
        "what do you see here?",
        "what is shown in this picture?",
        "which thing is this?",
        "what is the name of this thing?",
        "tell me what this is.",
        "what can be seen in the image?",
        "what would you call this?",
        "identify the object.",
    ),
    confirm=("is this a {name}?", "does the picture show a {name}?"),
    confirm_held_out=("is there a {name} in the image?", "can you see a {name} here?"),
    yes=YES,
    no=NO,
)

KIND_QUESTIONS = ("what kind of thing is this?", "which group does this belong to?")
TEXT_KIND_QUESTIONS = ("what kind of thing is a {name}?", "which group does a {name} belong to?")
TEXT_CONFIRM_QUESTIONS = ("is a {name} a {kind}?", "does a {name} belong to the group {kind}?")
