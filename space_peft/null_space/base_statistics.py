"""Statistics of a base model: what its layers see on retained data, written once, so that an erasure needs no retained row.

The constraint is a function of one matrix for each layer, the second moment `C = E[h h^T]` of its inputs. It depends on
the base model and the retained data alone, and not on the concept, the adapter or its settings. So it can be computed once
for a model, kept, and shared: `collect_statistics` makes it, `fit_null_space(statistics=...)` uses it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

from ..config import SpaceLoraConfig, auto_rank
from ..modeling.checksum import base_checksum, same_base
from ..modeling.layers import adapted_layers, adapter_config
from ..records.io import atomic_path, write_json
from ..records.places import refuse_missing
from ..records.safe_json import read_json
from .constraints import FITTED, most_columns
from .spectral import decompose


STATISTICS_NAME = "space_statistics.json"
_WEIGHTS = "space_statistics{suffix}.safetensors"
_FORMAT = "space_peft.statistics.v1"
# Eigenvectors kept at least: of small layers more than the soft constraint uses, because the text about a concept, which
# is added when it is erased, turns them.
LEAST_RANK = 64
# For vectors being rounded the rest may seem larger by this share of the smallest eigenvalue kept, and the kept eigenvalues by
# this share of the trace.
_SLACK, _ADDED = 0.05, 3e-3


def kept_rank(dim: int, max_rank: int | Literal["auto"] | None = "auto") -> int:
    """How many eigenpairs are kept of a second moment of `dim` rows; see [`collect_statistics`]."""
    if max_rank == "auto":
        max_rank = max(auto_rank(dim), LEAST_RANK)
    return dim if max_rank is None else min(dim, max_rank)


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """
    The second moment of one layer's inputs, `C ~ U diag(l - r) U^T + r I`: leading eigenpairs, and one value for the rest.

    Args:
        vectors (`torch.Tensor`): `U` `(d, k)`, float16: the leading eigenvectors.
        values (`torch.Tensor`): `l` `(k,)`, float32: their Rayleigh quotients, and a little more of the largest, see `of`.
        rest (`float`): `r`, the mean eigenvalue of all other directions.
        uncertainty (`float`): In no direction does `C` exceed this approximation of it by more; measured when it was made.
        counts (`dict[str, int]`): Samples seen, per kind of token.
    """

    vectors: torch.Tensor
    values: torch.Tensor
    rest: float
    uncertainty: float
    counts: dict[str, int]

    @property
    def dim(self) -> int:
        """`d`, the length of an input."""
        return self.vectors.shape[0]

    @property
    def rank(self) -> int:
        """`k`, the number of eigenvectors kept."""
        return self.vectors.shape[1]

    @classmethod
    def of(cls, moment: torch.Tensor, counts: Mapping[str, int], rank: int) -> SecondMoment:
        """Keeps the leading eigenpairs of a second moment.

        Args:
            moment (`torch.Tensor`): `C` `(d, d)`, float32 or float64.
            counts (`dict[str, int]`): Samples seen, per kind of token.
            rank (`int`): Eigenpairs to keep; all of them if there are no more.

        Raises:
            ValueError: If all inputs were zero.
        """
        d, mean = len(moment), float(moment.diagonal().mean(dtype=torch.float64))
        if mean == 0.0:
            raise ValueError("all retained inputs are zero; there is nothing to keep of them.")
        exact = decompose(moment / mean, min(rank, d)).vectors[:, :rank].to(moment)
        vectors = exact.to(torch.float16)
        # Of the rounded vectors, so that what is kept is measured as it is going to be used.
        basis = vectors.to(moment)
        values = (basis * (moment @ basis)).sum(dim=0)
        # Rounding turns a vector by some 2e-4. With a large eigenvalue that leaves more outside of what is kept than all that was
        # left out, and bounds would have to allow for it in every direction. Beside it a little more along the new vector will do.
        across = (values * (basis - exact).norm(dim=0)) ** 2
        slack = max(
            _SLACK * float(values[-1]), float(across.sum()) / (_ADDED * d * mean), torch.finfo(values.dtype).tiny
        )
        rest = max(float(d * mean - values.sum(dtype=torch.float64)), 0.0) / max(d - len(values), 1)
        values += across / slack
        kept = cls(vectors.cpu(), values.to("cpu", torch.float32), rest, 0.0, dict(counts))
        difference = moment - kept.dense(moment.dtype).to(moment.device)
        # All eigenvalues, not some by a Krylov method: it may stop at one that is smaller, and bounds rest on the largest.
        rounding = torch.finfo(moment.dtype).eps * float(difference.norm())
        uncertainty = float(torch.linalg.eigvalsh(difference)[-1]) + rounding
        return dataclasses.replace(kept, uncertainty=max(uncertainty, 0.0))

    def dense(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Returns the approximation of `C` `(d, d)`, on the CPU."""
        basis = self.vectors.to(dtype)
        moment = (basis * (self.values.to(dtype) - self.rest)) @ basis.T
        moment.diagonal().add_(self.rest)
        return moment


class Statistics(Mapping[str, SecondMoment]):
    """
    Second moments of a base model's layers on retained data, by layer name; made by [`collect_statistics`].

    Args:
        moments (`dict[str, SecondMoment]`): By the layer's name in the base model; layers of the same input share one.
        base (`str`): Checksum of the base model's weights, see [`base_checksum`].
        data (`str`): Digest of the retained batches, see [`DataDigest`].
        rows (`int`): Number of retained rows.
        kind (`str`): `"token"` or `"pooled"`, as `SpaceLoraConfig.statistics`.
        tokens_per_row (`int`, *optional*): As in [`SpaceLoraConfig`].
        model (`str`, *optional*): Id of the base model.
        commit (`str`, *optional*): Its commit on the Hub.
    """

    def __init__(
        self,
        moments: Mapping[str, SecondMoment],
        *,
        base: str,
        data: str,
        rows: int,
        kind: str = "token",
        tokens_per_row: int | None = None,
        model: str | None = None,
        commit: str | None = None,
    ):
        self._moments = dict(moments)
        self.base, self.data, self.rows = base, data, rows
        self.kind, self.tokens_per_row = kind, tokens_per_row
        self.model, self.commit = model, commit
        self._digest: str | None = None  # Nothing changes in it, and it takes reading all of it.

    def __getitem__(self, name: str) -> SecondMoment:
        return self._moments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    @property
    def unique(self) -> list[SecondMoment]:
        """Each second moment once."""
        return list({id(moment): moment for moment in self._moments.values()}.values())

    @property
    def num_bytes(self) -> int:
        """Size of what is kept."""
        tensors = (tensor for moment in self.unique for tensor in (moment.vectors, moment.values))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def check(self, model: nn.Module, adapter_name: str = "default") -> None:
        """Refuses statistics of another model, or made with other settings than an adapter asks for.

        Args:
            model (`PeftModel` or `PreTrainedModel`): With the adapter.
            adapter_name (`str`, defaults to `"default"`): The adapter.

        Raises:
            ValueError: If they cannot be used for it; the message says what to do.
        """
        config, layers = adapter_config(model, adapter_name), adapted_layers(model, adapter_name)
        inputs = {name: layer.in_features for name, layer in layers.items()}
        self.check_layers(config, inputs, base_checksum(model, adapter_name))

    def check_layers(self, config: SpaceLoraConfig, inputs: Mapping[str, int], base: str) -> None:
        """The same for an adapter that is not there yet.

        Args:
            config ([`SpaceLoraConfig`]): Of the adapter.
            inputs (`dict[str, int]`): By layer, the length of its inputs.
            base (`str`): The base model's [`base_checksum`].

        Raises:
            ValueError: See `check`.
        """
        if not same_base(self.base, base):
            raise ValueError(
                f"the statistics are of another base model ({self.model or 'of no name'}), or of another commit of it. Use "
                "those of this model, or collect them: collect_statistics(model, processor, retain_dataset)."
            )
        settings: dict[str, Any] = {"statistics": self.kind}
        if self.kind == "token":  # Pooled ones take all tokens of a row.
            settings["tokens_per_row"] = self.tokens_per_row
        for name, made in settings.items():
            if (asked := getattr(config, name)) != made:
                raise ValueError(f"`{name}` is {made!r} in the statistics, but {asked!r} is asked for; use {made!r}.")
        if FITTED[config.constraint].dtype == torch.float64:
            # It looks at directions of which only rounding is left.
            raise ValueError(
                "statistics keep the leading eigenpairs of each layer, which do not tell the directions that no retained "
                'input has; use constraint="soft", or fit a hard constraint to retained rows.'
            )
        if missing := [name for name in inputs if name not in self]:
            raise ValueError(
                f"the statistics hold nothing for {len(missing)} adapted layers, the first is {missing[0]!r}; leave them out "
                "of target_modules, or collect statistics of them."
            )
        for name, dim in inputs.items():
            moment = self[name]
            if moment.dim != dim:
                raise ValueError(f"layer {name!r} has {dim} inputs, but {moment.dim} in the statistics.")
            asked = most_columns(config.constraint, config.rank_limit(moment.dim), moment.dim)
            if moment.rank < asked:
                most = min(self[other].rank for other in inputs if self[other].rank < self[other].dim)
                raise ValueError(
                    f"`max_rank` is {config.max_rank!r}, which means {asked} eigenvectors for layer {name!r}, but the "
                    f"statistics keep {moment.rank}. Ask for what they have of all adapted layers, SpaceLoraConfig(max_rank={most}): "
                    "with fewer eigenvectors the same `strength` is stricter (version 0.2.0, which kept fewer, had 0.03). Or "
                    "collect them again: collect_statistics."
                )

    def digest(self) -> str:
        """A digest of everything in it: null spaces that were fitted from it carry this."""
        if self._digest is not None:
            return self._digest
        digest = hashlib.blake2b(json.dumps(self._header(), sort_keys=True).encode(), digest_size=16)
        for moment in self.unique:
            digest.update(moment.values.contiguous().numpy().tobytes())
            digest.update(moment.vectors.contiguous().view(torch.int16).numpy().tobytes())
        self._digest = digest.hexdigest()
        return self._digest

    def _header(self) -> dict:
        place = {id(moment): number for number, moment in enumerate(self.unique)}
        return {
            "format": _FORMAT,
            "model": self.model,
            "commit": self.commit,
            "base": self.base,
            "data": self.data,
            "rows": self.rows,
            "statistics": self.kind,
            "tokens_per_row": self.tokens_per_row,
            "layers": {name: place[id(moment)] for name, moment in self._moments.items()},
            "moments": [
                {"rest": moment.rest, "uncertainty": moment.uncertainty, "counts": moment.counts}
                for moment in self.unique
            ],
        }

    @staticmethod
    def check_folder(folder: str | os.PathLike) -> None:
        """Raises `FileExistsError` if a folder holds files of something else than statistics."""
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / STATISTICS_NAME).is_file():
            raise FileExistsError(f"{str(folder)!r} holds files of something else; choose another folder, or empty it.")

    def save(self, folder: str | os.PathLike, max_shard_size: str = "5GB") -> None:
        """Writes `space_statistics.json` and safetensors shards, all or nothing.

        Args:
            folder (`str` or `os.PathLike`): Replaced if it holds statistics; refused if it holds anything else.
            max_shard_size (`str`, defaults to `"5GB"`): Largest file.

        Raises:
            FileExistsError: If the folder holds files of something else.
        """
        folder = Path(folder)
        self.check_folder(folder)
        tensors = {}
        for number, moment in enumerate(self.unique):
            tensors[f"{number}.vectors"], tensors[f"{number}.values"] = moment.vectors, moment.values
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            save_torch_state_dict(tensors, temporary, filename_pattern=_WEIGHTS, max_shard_size=max_shard_size)
            write_json(temporary / STATISTICS_NAME, {**self._header(), "digest": self.digest()})


def load_statistics(
    place: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
) -> Statistics:
    """Reads what [`Statistics.save`] wrote, from a folder or from the Hub.

    Args:
        place (`str` or `os.PathLike`): A folder, or a repository of the Hub, e.g. "user/model-stats".
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): As in `huggingface_hub`.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If they are incomplete, damaged, or of another version.
    """
    folder = Path(place)
    if not folder.is_dir():
        refuse_missing(place)
        patterns = [STATISTICS_NAME, _WEIGHTS.format(suffix="*"), _WEIGHTS.format(suffix="") + ".index.json"]
        folder = Path(snapshot_download(str(place), revision=revision, token=token, allow_patterns=patterns))
    remedy = "Collect the statistics again, or download them again."
    header = read_json(folder / STATISTICS_NAME, kind="statistics of a base model", remedy=remedy)
    if header.get("format") != _FORMAT:
        raise ValueError(f"{str(folder)!r} holds statistics of format {header.get('format')!r}; expected {_FORMAT!r}.")
    try:
        moments = _read_moments(folder, header["moments"])
        statistics = Statistics(
            {name: moments[number] for name, number in header["layers"].items()},
            kind=header["statistics"],
            **{key: header[key] for key in ("base", "data", "rows", "tokens_per_row", "model", "commit")},
        )
        said, is_digest = header["digest"], statistics.digest()
    except (KeyError, TypeError, IndexError, AttributeError, SafetensorError) as error:
        raise ValueError(f"the statistics in {str(folder)!r} are incomplete: {error!r:.200}. {remedy}") from error
    if said != is_digest:
        raise ValueError(
            f"the statistics in {str(folder)!r} are not those that were saved: a file was changed. {remedy}"
        )
    return statistics


def _read_moments(folder: Path, scalars: Sequence[dict]) -> list[SecondMoment]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(_WEIGHTS.format(suffix="*"))):
        with safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}
    moments = []
    for number, own in enumerate(scalars):
        vectors, values = tensors[f"{number}.vectors"], tensors[f"{number}.values"]
        if vectors.dtype != torch.float16 or vectors.ndim != 2 or values.shape != vectors.shape[1:]:
            raise TypeError(f"vectors {number} are {vectors.dtype} {tuple(vectors.shape)}")
        if not (own["rest"] >= 0 and own["uncertainty"] >= 0):
            raise TypeError(f"moment {number} has a negative value")
        moments.append(SecondMoment(vectors, values, own["rest"], own["uncertainty"], own["counts"]))
    return moments
