"""What a trainer tells the public: card data filled while it trains, and pushes that publish nothing local."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress
from transformers.utils.logging import get_logger

from space_peft.anchors import anchor_info
from space_peft.data.names import mentions
from space_peft.data.source import dataset_source
from space_peft.evaluation import ProbeResults
from space_peft.evaluation.keys import REPORT_KEYS
from space_peft.evaluation.report import ErasureReport
from space_peft.null_space.identity import adapter_digest
from space_peft.null_space.space import save_null_spaces
from space_peft.records.base_commit import loaded_commit
from space_peft.records.base_model import is_hub_id
from space_peft.records.card_data import DatasetRecord, ErasureCardData
from space_peft.records.folder import (
    ADAPTER_CONFIG_NAME,
    CANARY_NAME,
    CARD_NAME,
    CERTIFICATE_NAME,
    NULL_SPACES_NAME,
    REPORT_NAME,
    SPACE_CONFIG_NAME,
)
from space_peft.records.measured import note_measured, remove_results, saved_digest
from space_peft.records.versions import collect_versions
from space_peft.retained.reading import RetainedRows

from .erasure_config import RESOLVED
from .given_adapter import ADAPTER
from .parts import TrainerPart


if TYPE_CHECKING:
    from datasets import Dataset


logger = get_logger(__name__)

# They say how a run was watched, saved and published, or follow from the machine it ran on.
_NOT_METHOD = {
    "accelerator_config", "bf16_full_eval", "dataloader_num_workers", "dataloader_pin_memory", "ddp_backend",
    "ddp_find_unused_parameters", "disable_tqdm", "do_eval", "do_train", "eval_strategy", "fit_save_steps",
    "hub_private_repo", "hub_revision", "hub_strategy", "local_rank", "log_level", "logging_steps", "logging_strategy",
    "per_device_eval_batch_size", "push_to_hub", "report_to", "save_steps", "save_strategy", "save_total_limit", "seed", "use_cpu",
}  # fmt: skip


class PublishingMixin(TrainerPart):
    """
    Base of the erasure trainers, before [`~transformers.Trainer`]: card and Hub.

    `push_to_hub`, `create_model_card` and the pushes of `hub_strategy` work as in Trainer, but what is published is a
    staged copy: no `training_args.bin`, no paths, the base model by its Hub id. Under `hub_strategy` "checkpoint" and
    "all_checkpoints" Trainer's own state (optimizer, random generators: pickles) goes to "last-checkpoint" or
    "checkpoint-N" as well, for without it no run can be resumed; `training_args.bin`, which holds the Hub's token, does
    not, and is not needed.

    Attributes:
        card_data ([`ErasureCardData`]): A copy of what the author gave, filled while training.
    """

    card_data: ErasureCardData
    _hub: HfApi | None = None

    # Card data

    def _begin_card(
        self,
        card_data: ErasureCardData | None,
        args,
        *,
        retain_dataset: Dataset | Sequence[dict],
        eval_dataset: Dataset | Sequence[dict] | dict | None,
    ) -> None:
        """Takes the author's card data and the data sets; before Trainer's constructor, which may make a repository."""
        if card_data is not None and not isinstance(card_data, ErasureCardData):
            raise TypeError(f"`card_data` must be an ErasureCardData, got {type(card_data).__name__}.")
        data = self.card_data = copy.deepcopy(card_data) or ErasureCardData()
        data.method, data.paper, data.uses_concept_images = self._name, self._paper, self._uses_concept_images
        data.concept, data.aliases, data.seed = self.concept, list(self.aliases), args.seed
        if self.anchors is not None:
            data.datasets.append(_pool_record(self.anchors))
        given = {"retained": retain_dataset, "evaluation": eval_dataset}
        data.datasets += [
            DatasetRecord(role, **dataset_source(rows.rows if isinstance(rows, RetainedRows) else rows))
            for role, several in given.items()
            for rows in (several.values() if isinstance(several, dict) else [several])
            if rows is not None
        ]
        self._training_began: float | None = None
        self._evaluated: dict[
            str, tuple
        ] = {}  # By the digest of the weights: step, and the probes' results before and after.
        if args.push_to_hub and data.redact:
            self._check_redaction(args)

    def _check_redaction(self, args) -> None:
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"`hub_strategy` {args.hub_strategy.value!r} pushes checkpoints as they are, with the name that the card "
                "data asks to redact; use 'end' or 'every_save'."
            )
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        if mentions(name, [self.concept, *self.aliases]):
            raise ValueError(
                f"the repository's name {name!r} mentions the concept to redact; set another `hub_model_id`."
            )

    def _fill_card(self) -> ErasureCardData:
        """Brings the card data up to date."""
        self._record_base()
        data, model = self.card_data, self.accelerator.unwrap_model(self.model)
        adapter = model.peft_config[ADAPTER]
        data.add_settings(type(self.args).__name__, self.args, defaults_of(self.args))
        data.add_settings(type(adapter).__name__, adapter, type(adapter)())
        data.steps, data.versions, data.hardware = self.state.global_step, collect_versions(), _hardware(self.args)
        data.created = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        return data

    def _record_base(self) -> None:
        """Which model is erased from, and which commit of it."""
        data, name = self.card_data, self.accelerator.unwrap_model(self.model).get_base_model().config._name_or_path
        if data.base_model is None and is_hub_id(name):
            data.base_model = name
            data.base_revision = loaded_commit(name, self.args.init_kwargs.get("revision"))

    def train(self, *args, **kwargs):
        self._training_began = time.time()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.card_data.seconds["erase"] = round(time.time() - self._training_began, 1)

    def _weights_now(self) -> str:
        """The digest of the adapter as it is; all processes must ask."""
        return adapter_digest(self.accelerator.unwrap_model(self.model), ADAPTER)

    def _note_probes(self, before: ProbeResults, after: ProbeResults) -> None:
        """Keeps the latest evaluation, or every one where an earlier checkpoint may be loaded at the end."""
        if self.state.global_step > 0:
            if not self.args.load_best_model_at_end:
                self._evaluated.clear()
            self._evaluated[self._weights_now()] = self.state.global_step, before, after

    @property
    def report(self) -> ErasureReport | None:
        """What the standard probes said before and after, of the adapter as it is; `None` if it was not evaluated on them."""
        return self._report_of(self._weights_now())

    def _report_of(self, weights: str) -> ErasureReport | None:
        step, before, after = self._evaluated.get(weights, (None, None, None))
        if step is None or not set(REPORT_KEYS) <= set(before.scores):
            return None
        seconds = {
            "evaluate_before": round(before.seconds, 1),
            **self.card_data.seconds,
            "evaluate_after": round(after.seconds, 1),
        }
        settings = {"seed": self.args.seed, "settings": {"steps": step}, "seconds": seconds}
        return ErasureReport.from_results(self.concept, before, after, **settings)

    def _save_public(self, folder: Path, replaced: str | None) -> None:
        """Writes card data and the results that were measured on the adapter as it is saved; those of others go.

        Args:
            folder (`Path`): Where the adapter was saved.
            replaced (`str`, *optional*): The digest of the adapter that was there before.
        """
        self._fill_card().save(folder)
        saved = saved_digest(folder)
        if saved is not None and self._measured_on == saved:
            if self.certificate is not None:
                self.certificate.save(folder / CERTIFICATE_NAME)
                note_measured(folder, {CERTIFICATE_NAME: saved})
            if self.canary is not None:
                self.canary.save(folder)
                note_measured(folder, {CANARY_NAME: saved})
        if saved is not None and (report := self._report_of(saved)) is not None:
            report.save(folder)
            note_measured(folder, {REPORT_NAME: saved})
        # What a former run left here must not pass for this one's.
        if self.null_space is None:
            for name in (SPACE_CONFIG_NAME, NULL_SPACES_NAME):
                if (folder / name).is_file():
                    logger.warning("Removed %s: this adapter is trained without a constraint.", folder / name)
                    (folder / name).unlink()
        began = self._training_began
        if began is None and replaced not in (None, saved):
            began = time.time()
        remove_results(folder, saved, began)

    @staticmethod
    def _card_before(folder: Path) -> bytes | None:
        card = folder / CARD_NAME
        return card.read_bytes() if card.is_file() else None

    @staticmethod
    def _keep_card(folder: Path, before: bytes | None, *, same: bool) -> None:
        """Takes back what PEFT does to the card whenever it saves an adapter: it leaves an empty one, and edits any other.

        Args:
            folder (`Path`): Where the adapter was saved.
            before (`bytes`, *optional*): The card that was there.
            same (`bool`): Whether the same weights were; if not, a card that was made of their results is stale.
        """
        from space_peft.hub_cards.staging import is_handwritten

        card = folder / CARD_NAME
        if before is not None:
            card.write_bytes(before)
        if not is_handwritten(card) and (before is None or not same):
            card.unlink(missing_ok=True)

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        # With `push_to_hub=True` this is called by the constructor: nobody wants to learn after training that nothing
        # can be pushed.
        if self.is_world_process_zero():
            data, config = self.card_data, self.accelerator.unwrap_model(self.model).get_base_model().config
            if data.base_model is None and not is_hub_id(config._name_or_path):
                raise ValueError(
                    f"the base model was loaded from {config._name_or_path!r}, which is not an id on the Hub, so the adapter "
                    "cannot be pushed: nobody else could load it. Say which model it is: "
                    "`card_data=ErasureCardData(base_model='org/name')`."
                )
            if data.redact:
                self._check_redaction(self.args)
        # By the argument of the trainer, not of the method, which older versions of transformers do not have (5.6).
        given = self.args.hub_private_repo
        self.args.hub_private_repo = given if private is None else private
        try:
            super().init_hf_repo(token=token)
        finally:
            self.args.hub_private_repo = given

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        **kwargs,
    ) -> None:
        """Writes the card of the adapter to `output_dir`, and the adapter if it was not saved yet.

        A README.md that a person wrote stays.

        Args:
            language (`str` or `list[str]`, *optional*): Kept in `card_data`, as the other arguments.
            license (`str`, *optional*): Of the adapter.
            tags (`str` or `list[str]`, *optional*): More tags.
            finetuned_from (`str`, *optional*): Hub id of the base model.
            kwargs (*optional*): Trainer's other arguments. They are not used: the card says what was done.
        """
        from space_peft.hub_cards import write_card
        from space_peft.hub_cards.staging import is_handwritten

        if not self.is_world_process_zero():
            return
        if unused := sorted(key for key, value in kwargs.items() if value is not None):
            logger.warning("The card of an erasure is made from its results: %s not used.", ", ".join(unused))
        data, folder = self.card_data, Path(self.args.output_dir)
        data.language, data.license = language or data.language, license or data.license
        data.base_model = finetuned_from or data.base_model
        data.tags += [tag for tag in ([tags] if isinstance(tags, str) else tags or []) if tag not in data.tags]
        if not (folder / ADAPTER_CONFIG_NAME).exists():
            self.save_model(_internal_call=True)  # A card speaks of an adapter, its layers and its size.
        self._fill_card().save(folder)
        if is_handwritten(folder / CARD_NAME):
            logger.warning("README.md was written by a person and is left as it is.")
        else:
            write_card(folder, repo_id=self.hub_model_id)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Saves the adapter and pushes it, with its card and results, to `args.hub_model_id`; see [`push_erasure`].

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): First line of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait for the upload.
            token (`str`, *optional*): Instead of `args.hub_token`.
            revision (`str`, *optional*): Branch; by default `args.hub_revision`, or the main one.
            private (`bool`, *optional*): For a repository that is created; by default `args.hub_private_repo`.
            kwargs (*optional*): See `create_model_card`.

        Returns:
            [`~huggingface_hub.CommitInfo`], or a `Future` of it if not `blocking`. `None` on other processes than the
            first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.pop("model_name", None)  # The title says base model and concept.
        self.create_model_card(**kwargs)
        self._finish_current_push()
        future = self._publish(self.args.output_dir, commit_message, token, revision)
        return future.result() if blocking else future

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's: called after each checkpoint, pushes the adapter and, if the strategy says so, the checkpoint."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if pushing and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if args.save_strategy == SaveStrategy.STEPS:
            message = f"Training in progress, step {self.state.global_step}"
        else:
            message = f"Training in progress, epoch {int(self.state.epoch)}"
        jobs = [self._publish(checkpoint_folder, message, args.hub_token)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            if self.null_spaces:
                # Their callback would save them to the checkpoint after this.
                save_null_spaces(Path(checkpoint_folder, NULL_SPACES_NAME), self.null_spaces)
            place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            jobs.append(self._publish(checkpoint_folder, f"{message}, checkpoint", args.hub_token, place=place))
        if pushing:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _publish(
        self,
        folder: str,
        message: str | None,
        token: str | None,
        revision: str | None = None,
        place: str | None = None,
    ) -> Future:
        """Stages a folder now, for a checkpoint may be deleted soon, and commits it in the background, one at a time."""
        from space_peft.hub_cards.commit import commit_folder
        from space_peft.hub_cards.push import DEFAULT_MESSAGE
        from space_peft.hub_cards.staging import stage, stage_checkpoint

        if self._hub is None:
            self._hub = HfApi()  # Its queue keeps the commits in order.
        message, revision = message or DEFAULT_MESSAGE, revision or self.args.hub_revision
        staged = tempfile.mkdtemp(prefix="space-peft-")
        try:
            if place is None:
                announced = [text for text in (message, revision) if text]
                stage(
                    folder,
                    staged,
                    repo_id=self.hub_model_id,
                    token=token,
                    # A checkpoint may be deleted, and its salt with it.
                    redaction_folder=self.args.output_dir,
                    announced=announced,
                )
            else:
                stage_checkpoint(folder, Path(staged) / place)
        except BaseException:
            shutil.rmtree(staged)
            raise

        def commit():
            try:
                return commit_folder(staged, self.hub_model_id, commit_message=message, token=token, revision=revision)
            finally:
                shutil.rmtree(staged)

        return self._hub.run_as_future(commit)


def _pool_record(anchors: Dataset) -> DatasetRecord:
    info = anchor_info(anchors)
    pool = info.get("pool") or {}
    names = {field.name for field in dataclasses.fields(DatasetRecord)} - {"role"}
    return DatasetRecord("pool", **{key: value for key, value in pool.items() if key in names})


def defaults_of(args) -> SimpleNamespace:
    """Defaults of the arguments, without making an instance: that would set up devices and processes once more."""
    defaults = {}
    for option in dataclasses.fields(args):
        # Older versions of transformers (5.6) fill in `fsdp_config` where no FSDP is used.
        unused = option.name == "fsdp_config" and not args.fsdp
        if option.name in _NOT_METHOD or unused:
            defaults[option.name] = getattr(args, option.name)  # Equal, so left out.
        elif option.default is not dataclasses.MISSING:
            defaults[option.name] = option.default
        elif option.default_factory is not dataclasses.MISSING:
            defaults[option.name] = option.default_factory()
        else:
            defaults[option.name] = None
    return SimpleNamespace(**defaults | RESOLVED)


def _hardware(args) -> dict[str, Any]:
    """Kinds and numbers of devices; nothing that names a machine."""
    if args.device.type == "cuda":
        name, count = torch.cuda.get_device_name(args.device), max(args.n_gpu, 1)
    else:
        name, count = (
            {"cpu": f"CPU ({platform.machine()})", "mps": "Apple GPU"}.get(args.device.type, args.device.type),
            1,
        )
    return {"devices": {name: count * args.world_size}, "processes": args.world_size}
