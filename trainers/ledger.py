"""Erasures one after another on one model: what was erased when, kept so that no later request undoes an earlier one."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from space_peft.config import SpaceLoraConfig
from space_peft.modeling.layers import adapted_layers, lora_weights
from space_peft.null_space.fitting import collect_moments
from space_peft.null_space.space import NullSpace, load_null_spaces, save_null_spaces
from space_peft.records.folder import LEDGER_NAME, REQUEST_STATISTICS_NAME
from space_peft.records.io import write_json
from space_peft.records.safe_json import read_json

from .erasure_trainer import ErasureTrainer
from .given_adapter import ADAPTER
from .pairs import forget_loader


_FORMAT = "space_peft.ledger.v1"


class ErasureLedger:
    """
    The requests that a model has served, in a folder: each one's adapter, and what the erased model sees of its rows.

    A request is trained on the model with all earlier adapters folded into its weights, and in the null space of the
    retained rows *and* of the earlier requests' rows: C <- C + C_request. So what the model says about an earlier
    concept, which by then is another answer, is retained knowledge as any other.

    ```python
    ledger = ErasureLedger("erased")
    model = ledger.fold(model)  # what was erased before, if anything
    for anchors in requests:
        trainer = SpaceTrainer(model, args, anchors=anchors, retain_dataset=retained, protect=ledger.protect)
        trainer.train()
        model = ledger.add(trainer)
    ledger.stack(base_model).save_pretrained("all")  # one adapter, for stock PEFT and the original model
    ```

    Args:
        folder (`str` or `os.PathLike`): Where it is kept; read if it is there, made by the first `add` otherwise.

    Raises:
        ValueError: If the folder's ledger is damaged or of another kind.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.requests: list[dict] = []
        if (self.folder / LEDGER_NAME).exists():
            ledger = read_json(self.folder / LEDGER_NAME, kind="ledger")
            if ledger.get("format") != _FORMAT or not isinstance(ledger.get("requests"), list):
                raise ValueError(
                    f"{str(self.folder / LEDGER_NAME)!r} is not a ledger of erasures (format {ledger.get('format')!r}); "
                    f"expected {_FORMAT!r}."
                )
            self.requests = ledger["requests"]

    def __len__(self) -> int:
        return len(self.requests)

    def place(self, number: int) -> Path:
        """The folder of a request's adapter.

        Args:
            number (`int`): Which, from 1 on.
        """
        # Not from a name: a concept's name may be no file name, or one that nobody shall read in a listing.
        return self.folder / f"{number:03d}"

    @property
    def protect(self) -> list[dict[str, NullSpace]]:
        """What the model saw of each request's rows once it was served, for the `protect` of the next trainer."""
        places = map(self.place, range(1, len(self) + 1))
        return [load_null_spaces(place / REQUEST_STATISTICS_NAME) for place in places]

    def add(self, trainer: ErasureTrainer):
        """Takes a trained request: saves its adapter and its statistics, notes it, and folds it into the model.

        Args:
            trainer ([`ErasureTrainer`]): After `train`.

        Returns:
            `PreTrainedModel`: The model with this request folded in, for the next one. `trainer.model` is used up.

        Raises:
            ValueError: If the trainer did not train, or ran in several processes.
        """
        if trainer.state.global_step == 0:
            raise ValueError("the trainer has not trained; call `train` before the request is added.")
        if trainer.args.world_size > 1:
            raise ValueError("a request is added in one process: load its adapter there and fold it in with `fold`.")
        place = self.place(len(self) + 1)
        trainer.save_model(str(place))
        save_null_spaces(place / REQUEST_STATISTICS_NAME, request_statistics(trainer))
        self.requests.append(
            {
                "concept": trainer.concept,
                "aliases": trainer.aliases,
                "method": trainer._name,
                "steps": trainer.state.global_step,
                "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            }
        )
        write_json(self.folder / LEDGER_NAME, {"format": _FORMAT, "requests": self.requests})
        return trainer.model.merge_and_unload()

    def fold(self, model):
        """Adds all adapters, in order, to a base model's weights: the model that the next request starts from.

        Args:
            model (`PreTrainedModel`): The original model.
        """
        for number in range(1, len(self) + 1):
            model = PeftModel.from_pretrained(model, self.place(number)).merge_and_unload()
        return model

    def stack(self, model) -> PeftModel:
        """Puts all adapters beside each other into one for the original model: ranks add up, and the sum is exact.

        A single request's adapter was trained on a model with the earlier ones folded in, and means nothing without
        them: this is the one to publish.

        Args:
            model (`PreTrainedModel`): The original model.

        Returns:
            `PeftModel`: With the one adapter "default", of stock LoRA.

        Raises:
            ValueError: If nothing was erased yet.
        """
        if not self.requests:
            raise ValueError(
                f"no request was added to the ledger in {str(self.folder)!r}, so there is nothing to stack."
            )
        # Not PEFT's `add_weighted_adapter`: it takes the first adapter's use_rslora, rank and alpha patterns over to the sum.
        first: Any = None  # its config
        parts: dict[str, list[tuple]] = {}  # by layer the matrices of each request
        for number in range(1, len(self) + 1):
            request = PeftModel.from_pretrained(model, self.place(number))
            first = first or request.peft_config[ADAPTER]
            for name, layer in adapted_layers(request).items():
                a, b, scaling = lora_weights(layer)
                parts.setdefault(name, []).append((scaling * a.detach(), b.detach()))
            model = request.unload()
        ranks = {name: sum(len(a) for a, _ in own) for name, own in parts.items()}
        most = max(ranks.values())
        patterns = {name: rank for name, rank in ranks.items() if rank != most}
        config = LoraConfig(
            r=most, lora_alpha=most, rank_pattern=patterns, alpha_pattern=dict(patterns), target_modules=sorted(parts),
            fan_in_fan_out=first.fan_in_fan_out, revision=first.revision, task_type=first.task_type, inference_mode=True,
        )  # fmt: skip
        stacked = get_peft_model(model, config)
        with torch.no_grad():
            for name, layer in adapted_layers(stacked).items():
                a, b, _ = lora_weights(layer)
                a.copy_(torch.cat([part for part, _ in parts[name]]))
                b.copy_(torch.cat([part for _, part in parts[name]], dim=1))
        return stacked


@torch.no_grad()
def request_statistics(trainer: ErasureTrainer) -> dict[str, NullSpace]:
    """Second moments of what each adapted layer sees of the rows to forget, now that they are forgotten.

    Args:
        trainer ([`ErasureTrainer`]): After training; its adapter is on.

    Returns:
        `dict[str, NullSpace]`: By layer; the leading eigenpairs, as many as a constraint keeps by default.
    """
    loader = forget_loader(trainer.processing_class, trainer.train_dataset.rows, trainer.args.fit_batch_size)
    config = trainer.model.peft_config[ADAPTER]
    defaults = SpaceLoraConfig()
    fitters = collect_moments(
        trainer.model,
        loader,
        statistics=getattr(config, "statistics", defaults.statistics),
        tokens_per_row=getattr(config, "tokens_per_row", defaults.tokens_per_row),
        progress=not trainer.args.disable_tqdm,
        adapted=True,
    )
    unique = {id(fitter): fitter for fitter in fitters.values()}
    spaces = {key: fitter.fit("soft", max_rank=defaults.rank_limit(fitter.dim)) for key, fitter in unique.items()}
    return {name: spaces[id(fitter)] for name, fitter in fitters.items()}
