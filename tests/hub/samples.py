"""A folder to push, and what to call it; shared by the tests of the local Hub."""

import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, create_commit


REPO = "user/adapter"


def make_folder(folder: Path) -> Path:
    """Small files, a large one (by its name), a binary one, an empty one, a folder and a name to quote."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- space-peft\n---\n# Card\n")
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(400_000))
    (folder / "pictures" / "before & after.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0" + os.urandom(2_000))
    (folder / "empty.txt").touch()
    return folder


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file's bytes, by path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def commit_files(files: dict[str, bytes], **options):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return create_commit(REPO, operations, commit_message="Add", **options)


def telling(files: dict[str, bytes], word: str) -> list[str]:
    """Files that say a word, in their name or their content; of weights their header: three letters stand among half a
    million bytes of numbers by chance, one time in four."""
    found = []
    for name, content in files.items():
        text = content[: 8 + int.from_bytes(content[:8], "little")] if name.endswith(".safetensors") else content
        if word in name.lower() or word.encode() in text.lower():
            found.append(name)
    return found
