"""Files that somebody else wrote: JSON within limits, names that stay in their folder."""

import json
import os
import string
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from space_peft.records.safe_json import MAX_DEPTH, MAX_VALUES, member_path, parse_json, read_json


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.dictionaries(st.text(), values))
def test_what_json_can_hold_is_read_as_it_was_written(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "file.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert read_json(path, kind="file") == content


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b'{"a": 1} {}', "is not valid JSON"),
        (b"\xff\xfe{}", "is not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "is not valid JSON"),
        (b"[1]", "holds a JSON list at its top level; expected a JSON object"),
        (b'"text"', "holds a string"),
        (b"true", "holds a boolean"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' appears twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e400}', "beyond float64"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested deeper than"),
        (b'{"a": ' + b"[" * 200_000, "nested deeper than"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_refused_with_the_file_and_the_remedy(tmp_path, raw, message):
    path = tmp_path / "space_thing.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as raised:
        read_json(path, kind="thing", remedy="Get it again.")
    assert str(path) in str(raised.value) and str(raised.value).endswith("Get it again.")


def test_depth_up_to_the_limit_is_read(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}")
    assert read_json(path, kind="file")["a"]


COSTLY = {
    # Each took the square of its length, or thirty times its length in memory.
    "a key that appears twice, the last of many": lambda n: (
        b"{" + b",".join(b'"%d":0' % i for i in range(n // 8)) + b',"%d":0}' % (n // 8 - 1)
    ),
    "a long integer": lambda n: b'{"a":' + b"7" * n + b"}",
    "many long integers": lambda n: b'{"a":[' + b",".join([b"7" * 999] * (n // 1000)) + b"]}",
    "a long fraction": lambda n: b'{"a":0.' + b"7" * n + b"}",
    "a small exponent": lambda n: b'{"a":1e-' + b"7" * n + b"}",
    "a long text": lambda n: b'{"a":"' + b"x" * n + b'"}',
    "escapes": lambda n: b'{"a":"' + rb"\u00e4" * (n // 6) + b'"}',
    "empty lists": lambda n: b'{"a":[' + b",".join([b"[]"] * (n // 3)) + b"]}",
    "objects": lambda n: b'{"a":[' + b",".join([b'{"b":{}}'] * (n // 9)) + b"]}",
    "depth": lambda n: b'{"a":' + b"[" * n,
    "depth, closed": lambda n: b'{"a":' + b"[" * (n // 2) + b"]" * (n // 2) + b"}",
    "blanks": lambda n: b"{" + b" " * n + b"}",
}


@pytest.mark.parametrize("make", COSTLY.values(), ids=COSTLY.keys())
def test_reading_takes_time_and_memory_in_proportion_to_the_length(make):
    def cost(raw):
        tracemalloc.start()
        begun = time.perf_counter()
        try:
            parse_json(raw, where="it")
        except ValueError as error:
            assert len(str(error)) < 500
        took, peak = time.perf_counter() - begun, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return took, peak

    raw = make(300_000)
    took, peak = cost(raw)
    # Tracing makes it several times slower; the square of this length would be minutes.
    assert took < 10, f"{took:.1f} s for {len(raw)} bytes"
    assert peak < 60 * len(raw) + 2**20


def test_many_values_are_refused_before_they_are_made():
    raw = b'{"a":[' + b",".join([b"[]"] * MAX_VALUES) + b"]}"
    tracemalloc.start()
    with pytest.raises(ValueError, match="it holds more than 2000000 values"):
        parse_json(raw, where="it")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_size_is_checked_before_anything_is_parsed(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{"a": "' + "x" * 93 + '"}')
    assert len(path.read_bytes()) == 102
    with pytest.raises(ValueError, match="larger than 101 bytes"):
        read_json(path, kind="file", max_bytes=101)
    assert read_json(path, kind="file", max_bytes=102)["a"] == "x" * 93


def test_missing_file_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no canary at"):
        read_json(tmp_path / "nothing.json", kind="canary")


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../a", "a/../../b", "a/..", "./a", "a//b", "a\\..\\b", "C:a", "C:\\a", "\\\\host\\a", "a\0b", "a\nb", None, 7],
)  # fmt: skip
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="expected a relative path inside"):
        member_path(tmp_path, name)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(alphabet=string.ascii_letters + "./\\:~ \0", max_size=12))
def test_no_name_leads_out(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("folder") / "inside"
    folder.mkdir()
    try:
        path = member_path(folder, name)
    except ValueError:
        return
    assert folder.resolve() in path.resolve().parents


def test_links_out_are_refused_and_those_of_the_hubs_cache_are_not(tmp_path):
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "inner").mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "out.json").symlink_to(tmp_path / "secret")
    (folder / "inner" / "up").symlink_to(tmp_path)
    for name in ("out.json", "inner/up/secret"):
        with pytest.raises(ValueError, match="a link that leads out"):
            member_path(folder, name)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "ff").write_text("{}")
    (folder / "in.json").symlink_to(os.path.join("..", "..", "blobs", "ff"))
    assert member_path(folder, "in.json").read_text() == "{}"
    elsewhere = tmp_path / "plain"
    elsewhere.mkdir()
    (elsewhere / "in.json").symlink_to(blobs / "ff")
    with pytest.raises(ValueError, match="a link that leads out"):
        member_path(elsewhere, "in.json")
