"""Which settings a method is tested with: the same search for all of them, on validation concepts."""

from __future__ import annotations

from .images import VALIDATION
from .methods import METHODS
from .tables import curve_hypervolume, mean_curve


FINALISTS = 2
"""Settings of each method that are tried on more than the first validation concept."""


def search_tasks(settings: dict[str, list[dict]], concepts) -> list[dict]:
    return [
        {"method": name, "settings": each, "concept": concept, "seed": 0, "probes": False, "depth": False}
        for concept in concepts
        for name, own in settings.items()
        for each in own
    ]


def beyond(name: str, settings: dict) -> dict | None:
    """The same settings with a learning rate outside the range; None for methods that have none."""
    rates = METHODS[name].knobs.get("learning_rate")
    if rates is None:
        return None
    rate = settings["learning_rate"]
    return {**settings, "learning_rate": 2 * rate if rate == max(rates) else rate / 2}


def candidates(name: str) -> list[dict]:
    inside = METHODS[name].settings()
    return inside + [outside for settings in inside if (outside := beyond(name, settings)) is not None]


def validation_rows(rows: list[dict], name: str, settings: dict) -> list[dict]:
    return [r for r in rows if r["method"] == name and r["settings"] == settings and r["concept"] in VALIDATION]


def mean_volume(rows: list[dict], name: str, settings: dict) -> float:
    own = validation_rows(rows, name, settings)
    return curve_hypervolume(mean_curve(own)) if own else -1.0  # The time was up before it ran.


def finalists(rows: list[dict], name: str) -> list[dict]:
    """A method's settings with the largest hypervolume on the first validation concept; of identical runs one.

    All of them for the closed form, which costs nothing to try.
    """
    if METHODS[name].trainer is None:
        return METHODS[name].settings()
    volumes, curves = [], []
    for settings in METHODS[name].settings():
        own = [row for row in validation_rows(rows, name, settings) if row["concept"] == VALIDATION[0]]
        if own and own[0]["curve"] not in curves:
            curves.append(own[0]["curve"])
            volumes.append((curve_hypervolume(own[0]["curve"]), settings))
    return [settings for _, settings in sorted(volumes, key=lambda pair: -pair[0])[:FINALISTS]]


def choose(rows: list[dict], names: list[str]) -> dict[str, dict]:
    """For each method the settings with the largest hypervolume on all validation concepts, the first of equals."""
    chosen = {}
    for name in names:
        tried = [(validation_rows(rows, name, settings), settings) for settings in candidates(name)]
        most = max(len(own) for own, _ in tried)
        # Settings that were dropped after the first concept do not compete with those tried on all.
        volumes = [(mean_volume(rows, name, settings), settings) for own, settings in tried if len(own) == most > 0]
        if volumes:
            chosen[name] = max(volumes, key=lambda pair: pair[0])[1]
    return chosen


def rounds(rows: dict[str, dict], names: list[str], concepts, settings_each: int | None = None):
    """The search, a list of tasks at a time; each is made from the rows of the ones before.

    Args:
        rows (`dict[str, dict]`): The runs there are, by anything; the caller adds those of each round before the next.
        names (`list[str]`): Methods.
        concepts (`tuple[str, ...]`): The first one sees all settings.
        settings_each (`int`, *optional*): Only a method's first so many settings.
    """
    yield search_tasks({name: METHODS[name].settings()[:settings_each] for name in names}, concepts[:1])
    best = {name: finalists(list(rows.values()), name) for name in names}
    yield search_tasks(best, concepts[1:])
    outside = {}
    for name, own in best.items():
        inside = max(own, key=lambda each, name=name: mean_volume(list(rows.values()), name, each), default=None)
        if inside is not None and (further := beyond(name, inside)) is not None:
            outside[name] = [further]
    yield search_tasks(outside, concepts)
