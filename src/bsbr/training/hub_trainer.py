"""transformers' Trainer with checkpoints that hold no pickle, are verified, and are there whole or not at all."""

import base64
import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerState

from bsbr.errors import UserError
from bsbr.files import write_atomic, write_json
from bsbr.manifest import compare, read_manifest, write_manifest

_NAME = re.compile(r"checkpoint-(\d+)")
_OPTIMIZER, _GROUPS, _STATE = "optimizer.safetensors", "optimizer.json", "trainer_state.json"


class PlainTrainer(Trainer):
    """Writes optimizer, schedule and random states as safetensors and JSON, and a manifest last.

    transformers' own are pickles, and a checkpoint that a killed run left half-written counts as the newest one. Under
    FSDP and DeepSpeed, whose checkpoints are made of other parts, these parts stay as transformers has them.
    """

    def go_on(self, checkpoint: str | None) -> None:
        """Train from a checkpoint to the end; from one of the last step, only take it over.

        transformers would train one step more there, where the last step is not the end of an epoch.

        Args:
            checkpoint: its path, or None to start.
        """
        if checkpoint is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            state = TrainerState.load_from_json(str(Path(checkpoint) / _STATE))
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(checkpoint)
                self.state = state
                return
        self.train(resume_from_checkpoint=checkpoint)

    def finish_checkpoint(self, step: int) -> None:
        """Write the manifest of the checkpoint of a step; until then it does not count.

        Args:
            step: of the checkpoint that was just saved.
        """
        if self.args.should_save:
            write_manifest(Path(self.args.output_dir or ".") / f"checkpoint-{step}")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        arguments = Path(output_dir or self.args.output_dir or ".") / "training_args.bin"
        arguments.unlink(missing_ok=True)  # a pickle that nobody reads

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            from safetensors.torch import save

            state = self.optimizer.state_dict()  # type: ignore[union-attr]
            tensors = {
                f"{index}/{name}": torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
                for index, values in state["state"].items()
                for name, value in values.items()
            }
            write_atomic(Path(output_dir) / _OPTIMIZER, save(tensors))
            schedule = self.lr_scheduler.state_dict()  # type: ignore[union-attr]
            write_json(Path(output_dir) / _GROUPS, {"groups": state["param_groups"], "schedule": schedule})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        from safetensors.torch import load_file

        content = _read(Path(checkpoint), _GROUPS)
        _require(Path(checkpoint), _OPTIMIZER)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(Path(checkpoint) / _OPTIMIZER).items():
            index, name = key.split("/", 1)
            state.setdefault(int(index), {})[name] = value
        groups = [group | {"betas": tuple(group["betas"])} for group in content["groups"]]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})  # type: ignore[union-attr]
        self.lr_scheduler.load_state_dict(content["schedule"])  # type: ignore[union-attr]

    def _save_rng_state(self, output_dir: str) -> None:
        version, internal, gauss = random.getstate()
        kind, keys, *rest = np.random.get_state(legacy=True)
        state = {
            "python": [version, list(internal), gauss],
            "numpy": [kind, keys.tolist(), *rest],  # type: ignore[union-attr]
            "cpu": _as_text(torch.get_rng_state()),
            "cuda": [_as_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        }
        write_json(Path(output_dir) / self._rng_file(), state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = _read(Path(checkpoint), self._rng_file())
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(_as_tensor(state["cpu"]))
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([_as_tensor(text) for text in state["cuda"]])

    def _rng_file(self) -> str:
        return f"rng_state_{self.args.process_index}.json"


def newest_checkpoint(folder: Path) -> str | None:
    """Find the newest whole checkpoint of a stage; what a killed run left of one is passed over with a warning.

    Args:
        folder: the stage's.
    Returns:
        The checkpoint's path, or None where there is none to go on from.
    Raises:
        UserError: there are finished checkpoints, but every one is damaged.
    """
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    fault = ""
    for _, path in sorted(found, reverse=True):
        damage, finished = _damage(path)
        if not damage:
            return str(path)
        warnings.warn(f'checkpoint "{path}" is left out: {damage}', stacklevel=2)
        fault = fault or (f'checkpoint "{path}": {damage}' if finished else "")
    if fault:
        raise UserError(f"{fault}, and there is no older one to resume from. Start again with another output")
    return None


def _damage(path: Path) -> tuple[str, bool]:
    """What is wrong with a checkpoint in a few words, and whether its saving had been finished."""
    try:
        files = read_manifest(path)
    except UserError:
        return "manifest.json is damaged", True
    if files is None or _STATE not in files:  # the model's own manifest comes before the checkpoint's
        return "it was not finished", False
    for name, entry in files.items():
        if not (path / name).is_file():
            return f"{name} missing", True
        if fault := compare(path / name, entry):
            return f"{name} {fault}", True
    return "", True


def _require(checkpoint: Path, name: str) -> None:
    if not (checkpoint / name).is_file():
        raise UserError(f'checkpoint "{checkpoint}": {name} missing. Remove it to resume from an older one')


def _read(checkpoint: Path, name: str) -> dict[str, Any]:
    _require(checkpoint, name)
    return json.loads((checkpoint / name).read_bytes())


def _as_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _as_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
