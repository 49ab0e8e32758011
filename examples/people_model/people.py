"""Who there is: people with their looks, names and facts, near twins, and who is forgotten; all drawn by one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

from looks import Identity, View
from names import draw_names
from parts import (
    BACKGROUNDS,
    BALD,
    BEARDS,
    BUILDS,
    CLOTHES,
    EXPRESSIONS,
    FACES,
    GLASSES,
    HAIR_COLOURS,
    HEADS,
    LITTLE_HAIR,
    MARKS,
    PATTERNS,
    SHADES,
    SKINS,
    UNSEEN_GLASSES,
    UNSEEN_SHADES,
)


SEED = 0
# private: those of whom some are forgotten; public: known from elsewhere, and never forgotten; stranger: no model is taught
# them.
GROUPS = {"private": 120, "public": 20, "stranger": 20}
TWINS = 12  # pairs, all private
FORGET = {"5": 6, "10": 12, "15": 18}  # people; each set holds the smaller ones
# Pictures of everybody: what is trained on, new ones of the same kinds, and ones with something that is never trained on.
PICTURES = {"train": 8, "test": 2, "unseen": 2}
# Features that can be told apart in a small picture. Twins differ in exactly one of them, and in nothing else.
STRONG = ("head", "hair", "skin", "beard")

TOWNS = (
    *("Lisbon", "Oslo", "Cairo", "Quito", "Hanoi", "Dublin", "Lagos", "Prague", "Seoul", "Turin", "Havana", "Nairobi"),
    *("Sydney", "Bergen", "Athens", "Mumbai", "Toronto", "Krakow", "Osaka", "Lima"),
)
PROFESSIONS = (
    *("baker", "pilot", "judge", "nurse", "farmer", "tailor", "dentist", "plumber", "teacher", "painter", "librarian"),
    *("carpenter", "gardener", "journalist", "chemist", "sailor", "architect", "firefighter", "butcher", "translator"),
)
HOBBIES = (
    *("chess", "kayaking", "knitting", "archery", "juggling", "fencing", "pottery", "surfing", "beekeeping", "origami"),
    *("skating", "cooking", "cycling", "dancing", "fishing", "drumming", "climbing", "rowing", "singing", "bowling"),
)


@dataclass(frozen=True)
class Picture:
    """One picture of a person.

    Args:
        part (`str`): `"train"`, `"test"` or `"unseen"`.
        view ([`View`]): What is particular about it.
    """

    part: str
    view: View


@dataclass(frozen=True)
class Person:
    """Somebody.

    Args:
        id (`str`): Unique; the first digit is the group's.
        name (`str`): First and last name.
        group (`str`): `"private"`, `"public"` or `"stranger"`.
        looks ([`Identity`]): What stays.
        town (`str`): Where they live.
        profession (`str`): What they work as.
        hobby (`str`): What they do in their free time.
        twin (`str`): Id of who looks like them but for one feature, or nothing.
        forget (`str`): The smallest request that names them: `"5"`, `"10"`, `"15"`, or nothing.
        pictures (`tuple[Picture, ...]`): All of them.
    """

    id: str
    name: str
    group: str
    looks: Identity
    town: str
    profession: str
    hobby: str
    twin: str = ""
    forget: str = ""
    pictures: tuple[Picture, ...] = ()


def draw_people(seed: int = SEED) -> list[Person]:
    """Everybody, in the order of their ids."""
    rng = random.Random(seed)
    count = sum(GROUPS.values())
    looks, twins = _draw_looks(count, rng)
    names = draw_names(count, rng)
    # Every value as often as any other, so that none is a good guess.
    facts: list[list[str]] = []
    while len(set(zip(*facts))) < count:  # nobody is somebody else's double in words
        facts = [_evenly(values, count, rng) for values in (TOWNS, PROFESSIONS, HOBBIES)]
    groups = [(group, f"{digit}{n:03d}") for digit, (group, size) in enumerate(GROUPS.items(), 1) for n in range(size)]
    people = [
        Person(id, names[i], group, looks[i], *(values[i] for values in facts)) for i, (group, id) in enumerate(groups)
    ]
    for one, other in twins:
        people[one] = replace(people[one], twin=people[other].id)
        people[other] = replace(people[other], twin=people[one].id)
    people = _draw_forgotten(people, rng)
    return [replace(person, pictures=_draw_pictures(random.Random(f"{seed}/{person.id}"))) for person in people]


def _evenly(values: tuple[str, ...], count: int, rng: random.Random) -> list[str]:
    drawn = [values[i % len(values)] for i in range(count)]
    rng.shuffle(drawn)
    return drawn


def _draw_looks(count: int, rng: random.Random) -> tuple[list[Identity], list[tuple[int, int]]]:
    """Looks of everybody, and which are twins: the first ones, so that all of them are private."""
    looks: list[Identity] = []
    twins: list[tuple[int, int]] = []
    heads = _evenly(HEADS, count * 4, rng)

    def apart(new: Identity) -> bool:
        return all(no_twins(new, old) for old in looks)

    while len(looks) < count:
        new = _draw_identity(heads.pop(), rng)
        if len(twins) < TWINS:
            pair = _draw_twins(new, STRONG[len(twins) % len(STRONG)], rng)
            if all(apart(one) for one in pair) and pair:
                twins.append((len(looks), len(looks) + 1))
                looks += pair
        elif apart(new):
            looks.append(new)
    return looks, twins


def no_twins(one: Identity, other: Identity) -> bool:
    """Whether two people differ as much as any two who are no twins: in two features, and of one head in two strong ones."""
    found = one.differs_in(other)
    strong = len(set(STRONG) & set(found))
    return len(found) >= 2 and ("head" in found or strong >= 2)


def _draw_identity(head: str, rng: random.Random) -> Identity:
    beard = rng.choice(BEARDS[1:]) if rng.random() < 0.35 else "none"
    # The colour of hair that is not there would be a feature that nobody sees.
    hair = "black" if head in BALD and beard == "none" else rng.choice(list(HAIR_COLOURS))
    return Identity(
        head,
        hair,
        skin=rng.choice(list(SKINS)),
        beard=beard,
        build=rng.choice(list(BUILDS)),
        face=rng.choice(list(FACES)),
        mark=rng.choice(MARKS),
    )


def _draw_twins(looks: Identity, feature: str, rng: random.Random) -> list[Identity]:
    """Two who differ in one feature only, so that it can be seen; nobody where it could not."""
    if looks.head in (LITTLE_HAIR if feature == "hair" else BALD):
        return []
    if feature == "beard":
        # A moustache or none, or one beard or another, is a matter of a few pixels.
        return [replace(looks, beard="none"), replace(looks, beard=rng.choice(("full", "full3")))]
    values = {"head": HEADS, "hair": tuple(HAIR_COLOURS), "skin": tuple(SKINS)}[feature]
    at = values.index(getattr(looks, feature))
    # Neighbours in the list of skins are hard to tell apart.
    near = range(at - 1, at + 2) if feature == "skin" else (at,)
    choices = [value for i, value in enumerate(values) if i not in near and value not in BALD]
    return [looks, replace(looks, **{feature: rng.choice(choices)})]


def _draw_forgotten(people: list[Person], rng: random.Random) -> list[Person]:
    """Says whom requests name: in each, somebody whose twin stays, and nobody with their twin."""
    twins = [i for i, person in enumerate(people) if person.twin and person.id < person.twin]
    others = [i for i, person in enumerate(people) if person.group == "private" and not person.twin]
    rng.shuffle(twins)
    rng.shuffle(others)
    forget: dict[int, str] = {}
    for share, size in FORGET.items():
        while len(forget) < size:
            # One in three has a twin.
            forget[(twins if len(forget) % 3 == 0 else others).pop()] = share
    return [replace(person, forget=forget.get(i, "")) for i, person in enumerate(people)]


def _draw_pictures(rng: random.Random) -> tuple[Picture, ...]:
    pictures: list[Picture] = []
    for part, count in PICTURES.items():
        for number in range(count):
            while True:
                view = _draw_view(rng)
                if part == "unseen":
                    new = [("glasses", UNSEEN_GLASSES), ("shade", UNSEEN_SHADES)][number % 2]
                    view = replace(view, **{new[0]: rng.choice(new[1])})
                # No picture is another one with the figure moved a little.
                if all(_changed(view, other.view) >= 2 for other in pictures):
                    break
            pictures.append(Picture(part, view))
    return tuple(pictures)


def _changed(one: View, other: View) -> int:
    drawn = ("expression", "glasses", "clothes", "pattern", "background", "shade")
    return sum(getattr(one, f.name) != getattr(other, f.name) for f in fields(View) if f.name in drawn)


def _draw_view(rng: random.Random) -> View:
    return View(
        expression=rng.choice(EXPRESSIONS),
        glasses=rng.choice(GLASSES),
        clothes=rng.choice(list(CLOTHES)),
        pattern=rng.choice(PATTERNS),
        background=rng.choice(list(BACKGROUNDS)),
        shade=rng.choice(SHADES),
        flip=rng.random() < 0.5,
        angle=round(rng.uniform(-12, 12), 1),
        zoom=round(rng.uniform(0.9, 1.3), 2),
        right=round(rng.uniform(-0.07, 0.07), 3),
        down=round(rng.uniform(-0.02, 0.06), 3),
    )
