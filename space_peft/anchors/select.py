"""TPAS, stage 1 of the method: public images that stand in for a concept, found by text (docs/method.md, section 1)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from datasets import Dataset, Features, Image, Value

from ..data.names import check_target, mentions
from ..data.source import dataset_source
from ..distributed.processes import gather_objects
from ..records.stages import track
from ..records.versions import versions
from .description import check_description
from .embeddings import embed_pool, embed_rows, indexed_embeddings
from .encoders import Encoder, resolve_encoder
from .info import set_anchor_info
from .picking import dots, pick
from .pool import Pool, open_pool, undecodable
from .processes import fail_together


def select_anchors(
    concept: str,
    pool: Dataset,
    *,
    model=None,
    processor=None,
    encoder: Encoder | None = None,
    k: int = 32,
    threshold: float | None = None,
    upper_threshold: float | None = None,
    diversity: float = 0.1,
    duplicate_threshold: float | None = 0.98,
    aliases: Sequence[str] = (),
    description: str | None = None,
    templates: Sequence[str] | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    id_column: str | None = None,
    exclude_by_caption: bool = True,
    skip_undecodable: bool = False,
    batch_size: int = 32,
    cache_dir: str | os.PathLike | bool | None = None,
    faiss_index: str | None = None,
    progress: bool = True,
) -> Dataset:
    """Selects the pool's images that are nearest to a concept's name, without the concept itself.

    With `e_c` the normalised mean of the embeddings of `concept`, `aliases` (each in every template) and `description`,
    images score `s = cos(z, e_c)`. Left out are, in this order: images whose caption names the concept, those with
    `s > upper_threshold` (they look like the target), those with `s < threshold` (`S_th`). Of the rest K are picked
    one by one (maximal marginal relevance, Carbonell and Goldstein 1998), each time the image with the largest
    `(1 - diversity) s - diversity max_chosen cos(z - m, z_chosen - m)`, `m` the mean of the pool; near-duplicates of an
    image already chosen are dropped. The mean is taken off between images only, where a common part would make all of
    them look alike; taken off the scores it was measured to change nothing. Deterministic; ties go to the better
    score, then to the lower pool row.

    Memory is that of the best `max(1000, 20 k)` embeddings and a few thousand rows, however large the pool. Where
    `torch.distributed` is initialised, every process has to call this: each embeds a share of the pool, with its own
    copy of the model, and all of them return what one alone would.

    Args:
        concept (`str`): Name of what shall be forgotten, at most 200 characters.
        pool (`datasets.Dataset`): Public images, in a column of type `Image`, in any mode.
        model (`PreTrainedModel` or `PeftModel`, *optional*): A multimodal model (its own space is used) or a dual
            encoder.
        processor (`ProcessorMixin`, *optional*): Its processor.
        encoder (`Encoder`, *optional*): Another shared space, used instead of `model` and `processor`.
        k (`int`, defaults to 32): How many anchors.
        threshold (`float`, *optional*): `S_th`, a cosine: lowest score accepted. Its scale depends on the encoder, so
            there is no threshold by default: the K best are taken.
        upper_threshold (`float`, *optional*): Highest score accepted. No limit by default.
        diversity (`float`, defaults to 0.1): Weight of unlikeness among anchors, from 0 (the best scores) to 1.
        duplicate_threshold (`float`, *optional*, defaults to 0.98): Cosine of two images' centred features above which
            one is a near-duplicate of the other; `None` keeps all. Not used with an encoder of captions, to which
            different images of one caption are the same.
        aliases (`list[str]`, *optional*): Other names; used for `e_c` and for the exclusion by caption.
        description (`str`, *optional*): A sentence on what the concept is; used for `e_c`.
        templates (`list[str]`, *optional*): Texts with `"{}"` for the name. Default: the encoder's.
        image_column (`str`, defaults to `"image"`): The pool's column of images.
        caption_column (`str`, *optional*): Its captions: strings, lists of strings or class labels. Default: the first
            such column of "caption", "captions", "name", "title", "text", "label".
        id_column (`str`, *optional*): Identifiers of its rows. Default: "id" or "image_id", if there is one.
        exclude_by_caption (`bool`, defaults to `True`): Whether to leave out images whose caption names the concept
            or an alias: as whole words, in any case, singular or plural.
        skip_undecodable (`bool`, defaults to `False`): Leave out (and count) images that do not decode, instead of an
            error.
        batch_size (`int`, defaults to 32): Images embedded at a time.
        cache_dir (`str` or `False`, *optional*): Where to cache the pool's embeddings, by default `space_peft` in the
            Hugging Face cache; `False` keeps them in memory. The cache is keyed by pool and encoder, weights included,
            and written while the pool is embedded: a killed run goes on where it was.
        faiss_index (`str`, *optional*): Name of a FAISS index of the pool (`Dataset.add_faiss_index`) of this encoder's
            embeddings, of length 1 and not compressed: they are read from it instead of embedding the pool.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Returns:
        `datasets.Dataset`: At most `k` rows, in the order they were picked: `image` (RGB), `score`, `rank` (0 is picked
        first), `pool_row`, and `caption` and `pool_id` where the pool has them. `anchor_info` tells the provenance.

    Raises:
        TypeError: If the pool is no `datasets.Dataset`, or a name is no string.
        ValueError: If an argument is out of range, an image does not decode, or nothing is left (with the counts why).

    Example:

    ```python
    >>> anchors = select_anchors("fox", pool, model=model, processor=processor, k=16, aliases=["vulpes"])
    >>> anchor_info(anchors)["excluded"]
    ```
    """
    with fail_together():
        concept, aliases = check_target(concept, aliases)
        description = check_description(description)
        _check_settings(k, diversity, threshold, upper_threshold, duplicate_threshold, batch_size)
        opened = open_pool(pool, image_column=image_column, caption_column=caption_column, id_column=id_column)
        encoder = resolve_encoder(model, processor, encoder)
        if encoder.reads == "caption" and opened.caption_column is None:
            raise ValueError(
                f"encoder {encoder.name!r} reads captions, but the pool has none (columns {opened.data.column_names}): "
                "set `caption_column`, or use an encoder of images."
            )
        templates = _check_templates(encoder.templates if templates is None else templates)
        target = concept_embedding(encoder, concept, aliases=aliases, description=description, templates=templates)
    # Captions repeat from picture to picture.
    distinct = None if encoder.reads == "caption" else duplicate_threshold
    info = {
        "stage": "selected",
        "method": "text-guided",
        "concept": concept,
        "aliases": list(aliases),
        "description": description,
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint,
        "templates": list(templates),
        "threshold": threshold,
        "upper_threshold": upper_threshold,
        "diversity": diversity,
        "duplicate_threshold": distinct,
    }
    target = _agree(
        target,
        {**info, "k": k, "pool rows": len(opened), "skip_undecodable": skip_undecodable, "faiss_index": faiss_index},
    )
    if faiss_index is None:
        embeddings = embed_pool(
            opened,
            encoder,
            len(target),
            batch_size=batch_size,
            cache_dir=cache_dir,
            skip_undecodable=skip_undecodable,
            progress=progress,
        )
    else:
        with fail_together():
            embeddings = indexed_embeddings(pool, faiss_index, opened, encoder, len(target))
    with fail_together():
        named = _named_rows(opened, embeddings.row_ranges(), (concept, *aliases), exclude_by_caption, upper_threshold)
    rows, scores, found = pick(
        embeddings,
        target,
        named,
        k,
        threshold=threshold,
        upper_threshold=upper_threshold,
        diversity=diversity,
        duplicate_threshold=distinct,
    )
    if found.known == 0:
        what = "images decodes" if encoder.reads == "image" else "captions has text"
        raise ValueError(f"none of the pool's {len(opened)} {what}: there is nothing to choose anchors from.")
    nothing = "undecodable" if encoder.reads == "image" else "no_caption"
    excluded = {nothing: found.excluded.pop("nothing_to_embed"), **found.excluded}
    _check_count(len(rows), k, concept, len(opened), excluded, (found.lowest, found.highest))
    return _anchors(opened, rows, scores, {**info, **_pool_info(opened, exclude_by_caption, excluded, k, len(rows))})


def select_random_anchors(
    concept: str,
    pool: Dataset,
    *,
    model=None,
    processor=None,
    encoder: Encoder | None = None,
    k: int = 32,
    seed: int = 0,
    aliases: Sequence[str] = (),
    image_column: str = "image",
    caption_column: str | None = None,
    id_column: str | None = None,
    exclude_by_caption: bool = True,
    skip_undecodable: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> Dataset:
    """Draws anchors at random from the pool, without the concept itself: the control of `select_anchors`.

    Args:
        concept (`str`): Name of what shall be forgotten.
        pool (`datasets.Dataset`): As for `select_anchors`.
        model, processor, encoder: As for `select_anchors`, but optional: they only give the drawn images their score,
            which is NaN without them.
        k (`int`, defaults to 32): How many anchors.
        seed (`int`, defaults to 0): Of the draw.
        aliases, image_column, caption_column, id_column, exclude_by_caption, skip_undecodable, batch_size,
            progress: As for `select_anchors`.

    Returns:
        `datasets.Dataset`: The same columns and provenance as of `select_anchors`.

    Raises:
        ValueError: As `select_anchors`.
    """
    concept, aliases = check_target(concept, aliases)
    _check_settings(k, 0.0, None, None, None, batch_size)
    opened = open_pool(pool, image_column=image_column, caption_column=caption_column, id_column=id_column)
    if encoder is not None or model is not None or processor is not None:
        encoder = resolve_encoder(model, processor, encoder)
    blocks = [range(start, min(start + 65536, len(opened))) for start in range(0, len(opened), 65536)]
    named = _named_rows(opened, blocks, (concept, *aliases), exclude_by_caption, None)
    excluded = {"caption": int(named.sum()), "undecodable": 0}
    rows: list[int] = []
    for row in np.random.default_rng(seed).permutation(np.flatnonzero(~named)):
        if len(rows) == k:
            break
        if skip_undecodable and isinstance(opened.images([row])[0], Exception):
            excluded["undecodable"] += 1
            continue
        rows.append(int(row))
    _check_count(len(rows), k, concept, len(opened), excluded, None)
    scores = np.full(len(rows), np.nan, dtype=np.float32)
    if encoder is not None:
        target = concept_embedding(encoder, concept, aliases=aliases)
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        shown = track(batches, "Embedding anchors", unit="batch", show=progress, leave=True)
        # An image that does not decode was left out above; rows without a caption have no score.
        vectors = [embed_rows(opened, encoder, batch, len(target), skip_undecodable) for batch in shown]
        scores = dots(np.concatenate(vectors), target)
    info = {
        "stage": "selected",
        "method": "random",
        "concept": concept,
        "aliases": list(aliases),
        "encoder": None if encoder is None else encoder.name,
        "encoder_fingerprint": None if encoder is None else encoder.fingerprint,
        "seed": seed,
    }
    return _anchors(opened, rows, scores, {**info, **_pool_info(opened, exclude_by_caption, excluded, k, len(rows))})


def concept_embedding(
    encoder: Encoder,
    concept: str,
    *,
    aliases: Sequence[str] = (),
    description: str | None = None,
    templates: Sequence[str] | None = None,
) -> np.ndarray:
    """`e_c`: the normalised mean of the embeddings of all that is known of a concept in words.

    Args:
        encoder (`Encoder`): The shared space.
        concept (`str`): The name.
        aliases (`list[str]`, *optional*): Other names.
        description (`str`, *optional*): Embedded as it is, with the weight of one name in one template.
        templates (`list[str]`, *optional*): Texts with `"{}"` for the name. Default: the encoder's.

    Returns:
        `np.ndarray`: `(d,)` float32, of length 1.
    """
    concept, aliases = check_target(concept, aliases)
    description = check_description(description)
    templates = encoder.templates if templates is None else templates
    texts = [template.replace("{}", name) for name in (concept, *aliases) for template in templates]
    texts += [description] if description else []
    mean = np.asarray(encoder.embed_texts(texts), dtype=np.float32).mean(axis=0)
    norm = float(np.linalg.norm(mean))
    if not norm > 0:  # also true of NaN
        raise ValueError(f"encoder {encoder.name!r} gives no direction for {concept!r}: its embedding has norm {norm}.")
    return mean / norm


def _check_settings(k, diversity, threshold, upper_threshold, duplicate_threshold, batch_size) -> None:
    for name, value in (("k", k), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
    if not 0 <= diversity <= 1:
        raise ValueError(f"`diversity` is a weight between 0 and 1, got {diversity!r}.")
    limits = {"threshold": threshold, "upper_threshold": upper_threshold, "duplicate_threshold": duplicate_threshold}
    for name, value in limits.items():
        if value is not None and not -1 <= value <= 1:
            raise ValueError(f"`{name}` is a cosine, between -1 and 1, or None; got {value!r}.")
    if threshold is not None and upper_threshold is not None and threshold >= upper_threshold:
        raise ValueError(f"`threshold` ({threshold}) must be below `upper_threshold` ({upper_threshold}).")


def _check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    if isinstance(templates, str) or not templates or not all("{}" in template for template in templates):
        raise ValueError(f"`templates` must be a sequence of texts with '{{}}' where the name goes, got {templates!r}.")
    return tuple(templates)


def _agree(target: np.ndarray, asked: dict) -> np.ndarray:
    """The first process' `e_c`, once all of them were asked the same: otherwise each would wait for another thing."""
    answers = gather_objects((target, asked))
    for rank, (_, other) in enumerate(answers):
        different = {key: (answers[0][1][key], other[key]) for key in asked if answers[0][1][key] != other[key]}
        if different:
            raise ValueError(
                f"the processes were asked for different anchors: (process 0, process {rank}) have {different}. Give "
                "all of them the same pool, model and settings."
            )
    return answers[0][0]


def _named_rows(
    pool: Pool, blocks: Iterable[range], names: Sequence[str], exclude_by_caption: bool, upper_threshold
) -> np.ndarray:
    """Which rows' captions name the target, `(n,)` bool; only rows in `blocks` are looked at."""
    named = np.zeros(len(pool), dtype=bool)
    if not exclude_by_caption:
        return named
    if pool.caption_column is None:
        if upper_threshold is None:
            warnings.warn(
                f"the pool has no captions (columns {pool.data.column_names}): images of {names[0]!r} itself cannot be told "
                "apart and may become anchors. If a column says what they show, name it (`caption_column`); otherwise look at "
                "the anchors before you rely on them. In Python, `upper_threshold` leaves out what scores as high as the "
                "concept itself, and `exclude_by_caption=False` says that the pool is free of it.",
                stacklevel=3,
            )
        return named
    # Captions repeat in most pools (class names above all), and matching is the slow part.
    verdict = lru_cache(maxsize=65536)(lambda caption: bool(caption) and mentions(caption, names))
    for rows in blocks:
        named[rows.start : rows.stop] = [verdict(caption) for caption in pool.captions(rows)]
    return named


def _check_count(
    got: int, k: int, concept: str, size: int, excluded: dict[str, int], scores: tuple[float, float] | None
) -> None:
    if got >= k:
        return
    counts = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in excluded.items() if count)
    message = f"of the pool's {size} images {got} can stand in for {concept!r}, {k} were asked for"
    message += f"; left out: {counts or 'none'}."
    if scores is not None:
        message += f" Scores range from {scores[0]:.3f} to {scores[1]:.3f}."
    if got == 0:
        raise ValueError(
            message
            + " Lower `threshold`, raise `upper_threshold`, or give a pool with other images than the concept's own."
        )
    warnings.warn(message + " Use a larger pool, a lower `threshold`, or a smaller `k`.", stacklevel=3)


def _pool_info(pool: Pool, exclude_by_caption: bool, excluded: dict[str, int], k: int, got: int) -> dict:
    return {
        "exclude_by_caption": exclude_by_caption and pool.caption_column is not None,
        "excluded": excluded,
        "k": k,
        "anchors": got,
        "pool": {
            **dataset_source(pool.data),
            "fingerprint": pool.fingerprint,
            "rows": len(pool),
            "image_column": pool.image_column,
            "caption_column": pool.caption_column,
            "id_column": pool.id_column,
        },
        "versions": versions("space-peft", "datasets", "torch", "transformers"),
    }


def _anchors(pool: Pool, rows: Sequence[int], scores: np.ndarray, info: dict) -> Dataset:
    """The result: self-contained (the images are copied out of the pool's files), in RGB."""
    images = pool.images(rows)
    for row, image in zip(rows, images, strict=True):
        if isinstance(image, Exception):
            raise undecodable(int(row), image)
    columns = {
        "image": images,
        "score": np.asarray(scores, dtype=np.float32),
        "rank": list(range(len(rows))),
        "pool_row": [int(row) for row in rows],
    }
    features = {"image": Image(), "score": Value("float32"), "rank": Value("int32"), "pool_row": Value("int64")}
    if pool.caption_column is not None:
        columns["caption"] = pool.captions(columns["pool_row"])
        features["caption"] = Value("string")
    if pool.id_column is not None:
        columns["pool_id"] = pool.data.select_columns([pool.id_column])[columns["pool_row"]][pool.id_column]
        features["pool_id"] = pool.data.features[pool.id_column]
    return set_anchor_info(Dataset.from_dict(columns, features=Features(features)), info)
