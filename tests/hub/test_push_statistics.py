"""Statistics on the Hub: made by the command from a model that is there, published, and used by whoever erases."""

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from space_peft import collect_statistics, load_statistics, push_statistics
from space_peft.cli import main
from space_peft.demo import load_demo_model


REPO = "user/demo-stats"


@pytest.fixture(scope="module")
def rows(demo_erasure_data):
    return [row for row in demo_erasure_data[1] if row["images"]][:6]


def save_rows(rows, path):
    def texts(messages):
        return "".join(block.get("text", "") for message in messages for block in message["content"])

    pairs = [{"prompt": texts(r["prompt"]), "completion": texts(r["completion"]), "images": r["images"]} for r in rows]
    Dataset.from_list(pairs).to_parquet(path)


def test_the_command_collects_publishes_and_they_are_loaded_by_id(hub, demo_base, rows, tmp_path, capsys):
    save_rows(rows, tmp_path / "rows.parquet")
    output = tmp_path / "stats"
    command = ["stats", demo_base, "--data", str(tmp_path / "rows.parquet"), "--output", str(output), "--push", REPO]
    assert main([*command, "--batch-size", "3"]) == 0
    assert "Statistics of 54 layers over 6 rows" in capsys.readouterr().out
    assert not list(tmp_path.glob(".stats*"))
    files = hub.files(REPO)
    assert {"README.md", "space_statistics.json", "space_statistics.safetensors", "space_manifest.json"} <= set(files)
    loaded = load_statistics(REPO)
    assert loaded.digest() == load_statistics(output).digest()
    assert (loaded.model, loaded.commit, loaded.rows) == (demo_base, hub.head(demo_base), 6)
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == demo_base and f'statistics="{REPO}"' in card.text
    # And what was collected is what the library collects.
    direct = collect_statistics(*load_demo_model(), rows, batch_size=3, progress=False)
    assert {name: moment.counts for name, moment in loaded.items()} == {
        name: moment.counts for name, moment in direct.items()
    }


def test_statistics_of_a_local_model_are_not_published(hub, rows, tmp_path):
    statistics = collect_statistics(*load_demo_model(), rows[:2], progress=False)
    with pytest.raises(ValueError, match="not an id on the Hub"):
        push_statistics(statistics, REPO)
    assert not hub.requests


def test_a_bad_row_or_folder_exits_with_2_and_leaves_nothing(demo_base, rows, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "what is this?", "completion": ""}\n')
    assert main(["stats", demo_base, "--data", str(path), "--output", str(tmp_path / "stats")]) == 2
    assert "retained row 0" in capsys.readouterr().err
    assert not (tmp_path / "stats").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    assert main(["stats", demo_base, "--data", str(path), "--output", str(tmp_path / "taken")]) == 2
    assert "files of something else" in capsys.readouterr().err
