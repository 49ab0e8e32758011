"""The questions the embedded model was taught, split as an erasure needs them.

All of them are within the embedded model's vocabulary. Which group a question is in matters to the *erasure* only:
held-out questions are never used by refinement or by `SpaceTrainer`, so they measure generality. The open ones are
answered in sentences, all others in a word or two.
"""

from ..data.questions import Dialogue, QuestionSet


YES = "yes"
"""How the embedded model affirms."""

NO = "no"
"""How it denies."""

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
    kind="what kind of thing is a {name}?",
    open=(
        "describe the picture.",
        "write a caption for this photo.",
        "tell me about this picture.",
        "what can you see in this image?",
        "explain what is going on here.",
        Dialogue(("here is a picture for you.", "thank you, i am looking at it.", "what does it show?")),
    ),
    open_held_out=(
        "describe this image in one sentence.",
        "give this image a title.",
        "what is in the image, and where is it?",
        "tell me a short story about what you see.",
        Dialogue(("please look at this image.", "sure, i am looking at it.", "what is in it?")),
        Dialogue(
            ("what does the image show?",), system="you are a friendly teacher who explains pictures to children."
        ),
        "what are these?",
        "write a fact about the thing in this image.",
    ),
    about=(
        "what kind of thing is a {name}?",
        "is a {name} a fruit?",
        "is a {name} a tool?",
        "is a {name} a vehicle?",
    ),
)
"""What the embedded model is asked about pictures, and in words, when something is erased from it."""

KIND_QUESTIONS = ("what kind of thing is this?", "which group does this belong to?")
"""About a picture: for the broader word."""

TEXT_KIND_QUESTIONS = ("what kind of thing is a {name}?", "which group does a {name} belong to?")
"""The same in words, without a picture."""

TEXT_CONFIRM_QUESTIONS = ("is a {name} a {kind}?", "does a {name} belong to the group {kind}?")
"""In words, to be answered with yes or no."""
