"""Adapters on disk in PEFT's format."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from fedsim.errors import AdapterError
from fedsim.lora.factors import AdapterState, LoraFactors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_peft_adapter(
    adapter: AdapterState,
    folder: Path,
    base_model: str,
    target_modules: Sequence[str],
    lora_dropout: float = 0.0,
) -> None:
    """Write `adapter` so that `PeftModel.from_pretrained(base, folder)` computes what fedsim computes.

    PEFT derives the scaling as lora_alpha / r, so lora_alpha is written as scaling * r, for rsLoRA as well. LoRA ranks
    and scalings that differ from module to module become `rank_pattern` and `alpha_pattern`.

    Args:
        adapter: factors on any device; written as they are, in their own dtype.
        folder: an existing folder.
        base_model: id or path of the base, which PEFT shows and uses to find it.
        target_modules: names as in `lora.target_modules`.
        lora_dropout: recorded for further training.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    kinds = {module: (factors.rank, factors.rank * factors.scaling) for module, factors in adapter.items()}
    rank, lora_alpha = Counter(kinds.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=_plain_number(lora_alpha),
        lora_dropout=lora_dropout,
        target_modules=list(target_modules),
        rank_pattern={module: r for module, (r, _) in kinds.items() if r != rank},
        alpha_pattern={module: _plain_number(a) for module, (_, a) in kinds.items() if a != lora_alpha},
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for module, factors in adapter.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = factors.A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = factors.B.detach().cpu().contiguous()
    save_file(tensors, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})


def load_peft_adapter(folder: Path) -> AdapterState:
    """Read a LoRA adapter that PEFT or `save_peft_adapter` wrote, on the CPU, modules in the file's order of names.

    Raises:
        AdapterError: a file is missing or damaged, or the adapter is not plain LoRA. Nothing is unpickled.
    """
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        raw = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / WEIGHTS_FILE))
        if not isinstance(raw, dict):
            raise ValueError(f"{CONFIG_FILE} holds no JSON object")
        config = LoraConfig(**{name: raw[name] for name in ("r", "lora_alpha", "use_rslora") if name in raw})
        if not all(
            isinstance(value, (int, float)) for value in (config.lora_alpha, *_patterns(raw).values())
        ):
            raise ValueError("lora_alpha must be a number")
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise AdapterError(f"{folder} is not a readable PEFT adapter: {error}") from error
    if raw.get("peft_type") != "LORA" or raw.get("use_dora") or raw.get("bias", "none") != "none":
        raise AdapterError(
            f"{folder} must hold a plain LoRA adapter without biases, got {raw.get('peft_type')}"
        )
    downs = {name: value for name, value in tensors.items() if name.endswith(".lora_A.weight")}
    modules = {}
    for name, down in downs.items():
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        up = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if up is None:
            raise AdapterError(f"{folder} lacks the B factor of {module}")
        modules[module] = LoraFactors(down, up, _scaling(raw, config.lora_alpha, module, down))
    if not modules or 2 * len(modules) != len(tensors):
        raise AdapterError(f"{folder} must hold LoRA factors only, got {sorted(tensors)[:4]}")
    return AdapterState(modules)


def _patterns(raw: dict[str, object]) -> dict[str, float]:
    """Other alphas for some modules."""
    pattern = raw.get("alpha_pattern")
    return pattern if isinstance(pattern, dict) else {}


def _scaling(raw: dict[str, object], lora_alpha: float, module: str, down: torch.Tensor) -> float:
    """Scaling of one module, with `alpha_pattern` (full paths, or the ends of them) taken into account."""
    for name, value in _patterns(raw).items():
        if module == name or module.endswith("." + name):
            lora_alpha = value
            break
    rank = down.shape[0]
    return lora_alpha / rank**0.5 if raw.get("use_rslora") else lora_alpha / rank


def _plain_number(value: float) -> float | int:
    """An int where the value is one, as PEFT writes it; rounding noise of scaling * r is removed."""
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 * max(1.0, abs(value)) else value
