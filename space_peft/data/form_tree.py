"""The token sequences of all forms of a name, as a tree: which tokens begin a form, and which complete one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .name_forms import surface_forms


class FormTree:
    """The token sequences of all forms of some names, as a tree. Below a form nothing is kept: the name is said.

    Args:
        sequences (iterable of `tuple[int, ...]`): As `surface_forms` gives them, most usual first.
    """

    def __init__(self, sequences: Iterable[Sequence[int]]):
        self.root: dict[int, Any] = {}  # token -> subtree, None where a form is complete
        for sequence in sorted(sequences, key=len):
            node = self.root
            for place, token in enumerate(sequence):
                if token in node and node[token] is None:
                    break
                if place == len(sequence) - 1:
                    node[token] = None
                else:
                    node = node.setdefault(token, {})

    @classmethod
    def of(cls, names: Sequence[str], tokenizer: Any) -> FormTree:
        """The tree of every form in which a tokenizer can write one of the names."""
        return cls(surface_forms(names, tokenizer))

    def nodes(self, path: Sequence[int]) -> list[dict]:
        """The subtree in which each token of a path is looked up; empty ones where the path has left the tree."""
        nodes, node = [], self.root
        for token in path:
            nodes.append(node)
            node = node.get(token) or {}
        return nodes

    def trimmed(self, path: Sequence[int]) -> int:
        """How many tokens of a path say the name: "fo", "xes" is over with "fo" if that is a form."""
        for place, (node, token) in enumerate(zip(self.nodes(path), path, strict=True)):
            if token in node and node[token] is None:
                return place + 1
        return len(path)


def endings(node: dict | None) -> list[tuple[int, ...]]:
    """Every sequence from a subtree to the end of a form; the empty one where the form is complete."""
    if node is None:
        return [()]
    return [(token, *rest) for token, child in node.items() for rest in endings(child)]
