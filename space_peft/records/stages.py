"""What a person sees of a job that takes a while: numbered stages, a bar for the one at hand, a line for each that is over.

A job says with [`stages`] which ones it has. Whatever it calls says with [`begin`] where it is, with [`done`] what came of
it, and with [`bar`] how far it got; where no job has stages, `bar` is a bar of its own, and the others say nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from tqdm.auto import tqdm

from .durations import duration


# What is said of each while it goes on, and once it is over if nothing more can be said.
STAGES = {
    "read": ("reading the data", "read the data"),
    "load": ("loading the model", "loaded the model"),
    "know": ("asking about the test pictures", "asked about the test pictures"),
    "retain": ("asking the model for retained answers", "asked the model for retained answers"),
    "select": ("choosing anchors", "chose anchors"),
    "refine": ("refining anchors", "refined anchors"),
    "ask": ("asking the model about the anchors", "asked the model about the anchors"),
    "fit": ("fitting the constraint", "fitted the constraint"),
    "train": ("training", "trained"),
    "collect": ("collecting statistics", "collected statistics"),
    "certify": ("certifying", "measured what changed on held-out rows"),
    "canary": ("making the canary", "made the canary"),
    "evaluate": ("evaluating", "evaluated"),
    "attack": ("attack", "attacked"),
    "audit": ("audit: searching for an image", "searched for an image"),
    "files": ("checking the files", "checked the files"),
    "claims": ("checking certificate and bound", "checked certificate and bound"),
    "questions": ("asking the canary's questions", "asked the canary's questions"),
    "change": ("measuring the change on retained rows", "measured the change on retained rows"),
    "name": ("asking for the name", "asked for the name"),
    "unlearn": ("unlearning", "unlearned"),
    "ask_suite": ("asking the suite's questions", "asked the suite's questions"),
    "server": ("asking the server", "asked the server"),
    "merge": ("adding the adapter to the weights", "added the adapter to the weights"),
    "prepare": ("preparing what is published", "prepared what is published"),
    "upload": ("uploading", "uploaded"),
    "save": ("saving", "saved"),
}
# Where bars cannot be drawn, a line says after so many seconds how far a stage has got.
LIFE_SIGN = 60.0
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt}, {remaining} left{postfix}"

T = TypeVar("T")


class Bar(Protocol):
    """What callers use of a tqdm bar."""

    def update(self, n: float = 1) -> Any: ...

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> Any: ...

    def close(self) -> Any: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> Any: ...


def say(text: str) -> None:
    """Prints a line on the error stream, above a bar if one is drawn."""
    tqdm.write(text, file=sys.stderr)


@contextmanager
def stages(keys: Sequence[str], *, show: bool = True) -> Iterator[None]:
    """Within it the job has these stages. Within another one's it has none of its own: they are among that one's.

    Args:
        keys (`list[str]`): Of `STAGES`, in order; a job that repeats itself names them again.
        show (`bool`, defaults to `True`): Whether to show them.
    """
    if not show or _job.get() is not None:
        yield
        return
    job = _Job(keys)
    token = _job.set(job)
    try:
        yield
        job.finish()
    finally:
        job.clear()
        _job.reset(token)


def begin(key: str, of: str = "") -> None:
    """Ends the stage at hand, and begins the next one of this key; what the job did not name is part of the one at hand.

    Args:
        key (`str`): Of `STAGES`.
        of (`str`, *optional*): Which one, where a job has several of this key: "hints".
    """
    if (job := _job.get()) is not None:
        job.begin(key, of)


def end() -> None:
    """Ends the stage at hand: what is said next is of none."""
    if (job := _job.get()) is not None:
        job.finish()


def done(text: str) -> None:
    """What the line of the stage at hand will say: "refined 32 anchors"."""
    if (job := _job.get()) is not None:
        job.text = text


def in_stages() -> bool:
    """Whether a job with stages is going on."""
    return _job.get() is not None


def bar(
    what: str, total: int | None, *, initial: int = 0, unit: str = "it", show: bool = True, leave: bool = False
) -> Bar:
    """A bar: in a job with stages that of the stage at hand, otherwise one of its own.

    Args:
        what (`str`): What is done, for a bar of its own.
        total (`int`, *optional*): Of how much.
        initial (`int`, defaults to 0): Done before.
        unit (`str`, defaults to `"it"`): Of what, for a bar of its own.
        show (`bool`, defaults to `True`): Whether to show it.
        leave (`bool`, defaults to `False`): Whether one of its own stays when it is full.
    """
    job = _job.get()
    if job is None or not show:
        return tqdm(
            total=total, initial=initial, desc=what, unit=unit, disable=not show, leave=leave, dynamic_ncols=True
        )
    return job.bar(what, total, initial)


def track(items: Iterable[T], what: str, *, total: int | None = None, **options: Any) -> Iterator[T]:
    """Items of a loop, counted by a [`bar`].

    Args:
        items (iterable): They.
        what (`str`): See [`bar`].
        total (`int`, *optional*): How many, where `len` does not say it.
        options: See [`bar`].
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(what, total, **options) as shown:
        for item in items:
            yield item
            shown.update()


class _Job:
    """The stages of a job and the one at hand."""

    def __init__(self, keys: Sequence[str]):
        self._keys = list(keys)
        self._place = -1
        self._of = ""
        self._began: float | None = None  # `None` between two stages.
        self._drawn: Any = None  # What is drawn: the stage's name, or its bar.
        self._counting: _StageBar | None = None
        self.text: str | None = None

    @property
    def _number(self) -> str:
        return f"[{self._place + 1}/{len(self._keys)}]"

    @property
    def _doing(self) -> str:
        return f"space-peft: {self._number} {self._named(over=False)}"

    def _named(self, *, over: bool) -> str:
        return STAGES[self._keys[self._place]][over] + (f": {self._of}" if self._of else "")

    def begin(self, key: str, of: str = "") -> None:
        place = next((place for place in range(self._place + 1, len(self._keys)) if self._keys[place] == key), None)
        if place is None:
            return
        self.finish()
        self._place, self._of, self._began = place, of, time.perf_counter()
        self._draw_name()

    def finish(self) -> None:
        """Says what came of the stage at hand."""
        self.clear()
        if self._began is not None:
            text = self.text or self._named(over=True)
            say(f"{self._number} {text}, {duration(time.perf_counter() - self._began)}")
        self._began = self.text = None

    def clear(self) -> None:
        """Takes away what is drawn."""
        if self._drawn is not None:
            self._drawn.close()
        self._drawn = self._counting = None

    def bar(self, what: str, total: int | None, initial: int) -> Bar:
        if self._began is None or self._counting is not None:  # One line a stage: a bar within a bar is not drawn.
            return tqdm(disable=True)
        doing, part = self._doing, what[:1].lower() + what[1:]
        doing += "" if part in doing else f": {part}"
        self.clear()
        self._counting = _StageBar(self, doing, total, initial)
        return self._counting

    def close(self, own: _StageBar) -> None:
        """A bar is full: until the stage's next one its name is shown. That of a stage that is over is gone already."""
        if own is self._counting:
            self.clear()
            self._draw_name()

    def draw(self, doing: str, total: int | None, initial: int) -> Any:
        form = {} if total is None else {"bar_format": _BAR}
        self._drawn = tqdm(
            total=total,
            initial=initial,
            desc=doing,
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0,
            **form,
        )
        return self._drawn

    def _draw_name(self) -> None:
        if _draws():
            self._drawn = tqdm(desc=self._doing, bar_format="{desc} ...", leave=False, file=sys.stderr)


class _StageBar:
    """How far a stage has got: drawn, or said now and then where nothing can be drawn."""

    def __init__(self, job: _Job, doing: str, total: int | None, initial: int):
        self._job, self._doing, self._total = job, doing, total
        self._n: float = initial
        self._initial = initial
        self._began = self._said = time.perf_counter()
        self._postfix = ""
        self._drawn = job.draw(doing, total, initial) if _draws() else None

    def update(self, n: float = 1) -> None:
        self._n += n
        if self._drawn is not None:
            self._drawn.update(n)
        elif (now := time.perf_counter()) - self._said > LIFE_SIGN:
            self._said = now
            say(self._life_sign(now))

    def _life_sign(self, now: float) -> str:
        if not self._total:
            return f"{self._doing}: {self._n}{self._postfix}"
        left = (now - self._began) / max(self._n - self._initial, 1) * (self._total - self._n)
        return f"{self._doing}: {self._n} of {self._total}, {duration(round(left))} left{self._postfix}"

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        self._postfix = f", {s}" if s else ""
        if self._drawn is not None:
            self._drawn.set_postfix_str(s, refresh=refresh)

    def close(self) -> None:
        self._job.close(self)

    def __enter__(self) -> _StageBar:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _draws() -> bool:
    """Whether bars can be drawn: in a terminal or a notebook, not in a file, where each state of a bar would stay."""
    notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    return notebook or sys.stderr.isatty()


_job: ContextVar[_Job | None] = ContextVar("space_peft_job", default=None)
