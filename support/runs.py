"""What a run's folder holds of its model: the checkpoint's tensors, and the config that rebuilds it."""
import math
from pathlib import Path

import torch

from formats.files import InputError, read_tensors
from formats.peft import Update

CHECKPOINT = "checkpoint.safetensors"  # of a run: trained weights and the optimizer's state
BEST = "best.safetensors"  # those of the validation with the lowest loss, where they aren't the last
RESUME_STATE = ("exp_avg.", "exp_avg_sq.", "step.", "scaler.", "losses")  # how names of `resume_state` begin

# What config.json of a run may hold, beside what train.py adds
KINDS = {"from": str, "vit": str, "llm": str, "adapter": str, "adapter_sizes": dict, "image_position": str,
         "prompt": str, "train": list, "layer": (int, list), "image_size": int, "placeholder": int,
         "split": bool, "training": dict}


def check_run(config: dict) -> None:
    """Raises ValueError where the config of a run lacks what it takes to build it, or a value is of another
    kind."""
    for name in ("from",) if config.get("from") else ("vit", "llm", "adapter", "adapter_sizes"):
        if config.get(name) is None:
            raise ValueError(f"{name!r} is missing")
    values = [(config.get(name), kind) for name, kind in KINDS.items()]
    values += [(size, (int, float)) for size in (config.get("adapter_sizes") or {}).values()]
    layer = config.get("layer")
    values += [(one, int) for one in layer] if isinstance(layer, list) else []
    for value, kind in values:
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{value!r} is out of place")
    if not {*config.get("train", ())} <= {"adapter", "llm", "vit"}:
        raise ValueError(f"train is {config['train']!r}")


def read_run(path: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a run's checkpoint, its weights in float32: those that came with a LoRA were once
    saved as they are computed with. Raises InputError."""
    found = read_tensors(path)
    for name, tensor in found.items():
        if name.startswith("weight.") and tensor.dtype in (torch.bfloat16, torch.float16):
            found[name] = tensor.float()
    return found


def updates_in(state: dict[str, torch.Tensor]) -> dict[str, dict[str, Update]]:
    """The LoRA of each backbone, by layer, that a run's checkpoint holds. Raises InputError."""
    updates = {"vit": {}, "llm": {}}
    for key, scale in state.items():
        if not key.startswith("scale."):
            continue
        name = key.removeprefix("scale.")
        if scale.shape or not math.isfinite(scale):
            raise InputError(f"the scale of {name} is {scale.tolist()}")
        for letter in "AB":
            if f"weight.{name}.{letter}" not in state:
                raise InputError(f"tensor 'weight.{name}.{letter}' is missing")
        A, B, m = (state.get(f"weight.{name}.{letter}") for letter in "ABm")
        part, _, layer = name.partition(".")
        updates[part][layer] = Update(A.float(), B.float(), scale.item(), m=None if m is None else m.float())
    return updates


def resume_state(moments: dict[str, dict[str, torch.Tensor]], scaler: torch.amp.GradScaler,
                 losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a run's checkpoint holds beside the model, to go on with: what AdamW keeps of each parameter, what
    the gradients' scaler keeps, and the losses since the last line of metrics.jsonl."""
    state = {f"{key}.{name}": value for name, kept in moments.items() for key, value in kept.items()}
    state |= {f"scaler.{key}": torch.tensor(value) for key, value in scaler.state_dict().items()}
    return state | {"losses": losses}
