"""Pytest plugin: PEFT's own tests, with `SpaceLoraConfig` wherever they say `LoraConfig`. Loaded by `run.py`.

Every test gets one outcome, written to the JSON file named by `PEERS_REPORT`:

- "passed" or "failed";
- "unlisted": a refusal or a wish for something of the Hub that no list of `refusals.py` has, which is a failure;
- "differs": `DIFFERS` lists that it asks for something that is another way round here on purpose;
- "refused": our config did not allow an option, and `REFUSALS` lists it with its reason;
- "skipped": by PEFT itself, or as it needs something of the Hub that `NOT_BUILT` lists.

With `PEERS_STOCK=1` nothing is replaced: that tells whether a test fails because of us.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import json
import os
import re
import sys
import time
import types
import warnings

import peft
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from PIL import Image
from refusals import DIFFERS, NOT_BUILT, refusal

from space_peft import SpaceLoraConfig


STOCK = peft.LoraConfig
CONFIG = STOCK if os.environ.get("PEERS_STOCK") == "1" else SpaceLoraConfig
OUR_FILE = inspect.getfile(SpaceLoraConfig)
# The tests as they run: by node id, `{"outcome": ..., "detail": ..., "ours": ...}`.
RESULTS: dict[str, dict] = {}
_made = 0  # configs of ours so far
_collecting = True


def pytest_configure(config):
    peft.LoraConfig = CONFIG
    # PEFT knows one class by type, so that its messages, and its tests' choices, go by this name.
    CONFIG.__name__ = STOCK.__name__
    original = CONFIG.__post_init__

    def counted(self):
        global _made
        _made += 1
        try:
            original(self)
        except ValueError as error:
            if not _collecting:
                raise
            # Made where its module is imported, as a parameter: the tests that get it are refused, not the whole file.
            self.refusal = error
            STOCK.__post_init__(self)

    CONFIG.__post_init__ = counted
    sys.modules[SpaceLoraConfig.__module__].warnings = types.SimpleNamespace(warn=_warn)
    # It would go online for every first use of an id; here all that there is lies in the local cache.
    import tests.testing_utils

    tests.testing_utils.hub_online_once = lambda model_id: contextlib.nullcontext()
    tests.testing_utils.load_dataset_english_quotes = _quotes
    tests.testing_utils.load_cat_image = lambda: Image.new("RGB", (48, 32), "orange")


def _warn(message, *args, stacklevel=1, **kwargs):
    """Our config's warnings, but that of an adapter saved without null spaces: here all are, and tests count warnings."""
    if "never attached to null spaces" not in str(message):
        warnings.warn(message, *args, stacklevel=stacklevel + 1, **kwargs)


def _quotes():
    return DatasetDict(train=Dataset.from_dict({"quote": [f"Quote number {i}." for i in range(64)]}))


def pytest_collection_modifyitems(config, items):
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("tests.") and CONFIG is not STOCK:
            assert STOCK not in vars(module).values(), f"{module.__name__} holds the stock LoraConfig"
    chosen = [item for item in items if _concerns_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _concerns_lora(item) -> bool:
    """By the config classes among its parameters; a test without any by what it, its class and its helpers name."""
    classes = {part if isinstance(part, type) else type(part) for part in _configs(_parameters(item))}
    if classes:
        return CONFIG in classes
    parts = [item.function, *(vars(item.cls).values() if item.cls else ())]
    return any(_says_lora(part, vars(item.module)) for part in parts if inspect.isfunction(part))


@functools.cache
def _names(code) -> set[str]:
    """What the code of a function refers to, functions inside it included."""
    inner = (_names(part) for part in code.co_consts if inspect.iscode(part))
    return set(code.co_names).union(*inner)


def _says_lora(function, module: dict, seen: frozenset = frozenset()) -> bool:
    names = _names(inspect.unwrap(function).__code__)
    if STOCK.__name__ in names:
        return True
    helpers = [module[name] for name in names if inspect.isfunction(module.get(name)) and name not in seen]
    return any(_says_lora(helper, module, seen | names) for helper in helpers)


def pytest_collection_finish(session):
    global _collecting
    _collecting = False
    # Many of the tests collect garbage at their end: not among the thousands of tests themselves.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    for config in _configs(_parameters(item)):
        if getattr(config, "refusal", None) is not None:
            raise config.refusal


def _parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def _configs(value):
    """The config classes and configs in nested parameters."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _configs(part)
    elif isinstance(value, peft.PeftConfig) or isinstance(value, type) and issubclass(value, peft.PeftConfig):
        yield value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    before, began = _made, time.perf_counter()
    result = yield
    RESULTS[item.nodeid].update(ours=_made > before, seconds=round(time.perf_counter() - began, 3))
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    record = RESULTS.setdefault(item.nodeid, {"outcome": "passed", "detail": ""})
    if report.skipped:
        expected = hasattr(report, "wasxfail")
        reason = report.wasxfail if expected else report.longrepr[-1].removeprefix("Skipped: ")
        record.update(outcome="skipped", detail=f"PEFT expects a failure: {reason}" if expected else reason)
    elif report.failed:
        outcome, detail = _classify(call.excinfo.value, item)
        record.update(outcome=outcome, detail=detail or str(report.longrepr)[-1500:])
        if outcome not in ("failed", "unlisted"):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1], detail)
    return report


def _classify(error: BaseException, item) -> tuple[str, str]:
    """What the error that ended a test means: it or one it arose from may be a refusal, or something not built."""
    expected, why = DIFFERS.get(item.function.__name__, ("", ""))
    if expected and CONFIG is not STOCK and re.search(expected, str(error)):
        return "differs", f"{item.function.__name__}: {why}"
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for error in chain:
        frames = list(_frames(error))
        if isinstance(error, ValueError) and frames and frames[-1].f_code.co_filename == OUR_FILE:
            listed = refusal(str(error))
            return ("refused", listed) if listed else ("unlisted", f"a refusal that is not listed: {error}")
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            wanted = {str(frame.f_locals["repo_id"]) for frame in frames if frame.f_locals.get("repo_id")}
            for name in sorted(wanted):
                if name in NOT_BUILT:
                    return "skipped", f"{name}: {NOT_BUILT[name]}"
            return "unlisted", f"needs of the Hub what is neither built nor listed: {sorted(wanted)} ({error})"
    return "failed", ""


def _frames(error):
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def pytest_sessionfinish(session, exitstatus):
    with open(os.environ["PEERS_REPORT"], "w", encoding="utf-8") as file:
        json.dump({"exit": int(exitstatus), "results": RESULTS}, file, indent=1)
