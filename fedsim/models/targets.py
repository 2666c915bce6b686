"""Which linear modules of a base model get an adapter."""

import difflib
from collections.abc import Mapping, Sequence

from torch import nn

from fedsim.errors import AdapterError, ConfigError


def find_targets(model: nn.Module, target_modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The linear modules that a LoRA configuration names.

    A target names a module whose dotted path equals it or ends with "." + target, as in PEFT. Works on the meta
    device.

    Args:
        model: a causal language model of `transformers`.
        target_modules: names or ends of dotted names.

    Returns:
        dotted path -> (in features, out features), in the model's order.

    Raises:
        ConfigError: a target matches no module, or a module that cannot be adapted.
    """
    modules = dict(model.named_modules())
    matches = {target: [path for path in modules if _names(target, path)] for target in target_modules}
    for target, paths in matches.items():
        if not paths:
            raise ConfigError(_unknown_target(target, model))
        for path in paths:
            _check_adaptable(target, path, modules[path], model)
    chosen = {path for paths in matches.values() for path in paths}
    targets = {}
    for path, module in modules.items():
        if path in chosen and isinstance(module, nn.Linear):
            targets[path] = (module.in_features, module.out_features)
    return targets


def _names(target: str, path: str) -> bool:
    return path == target or path.endswith("." + target)


def _check_adaptable(target: str, path: str, module: nn.Module, model: nn.Module) -> None:
    rule = f"lora.target_modules must name linear modules (torch.nn.Linear), and {target!r} names {path}, "
    if isinstance(module, nn.Embedding) or module is _output_head(model):
        raise ConfigError(
            f"{rule}the {'input' if isinstance(module, nn.Embedding) else 'output'} embedding, which stays frozen; "
            f"{type(model).__name__} has: {', '.join(_adaptable_names(model))}"
        )
    if type(module).__name__ == "Conv1D":
        raise ConfigError(
            f"{rule}a Conv1D (GPT-2's own layer with a transposed weight), which fedsim does not adapt; use a model "
            "built of torch.nn.Linear, such as OPT, Llama, GPT-NeoX or Qwen"
        )
    if not isinstance(module, nn.Linear):
        names = [
            name for name in _adaptable_names(model) if any(_names(name, p) for p in _below(path, module))
        ]
        raise ConfigError(
            f"{rule}a {type(module).__name__}; {'inside it are' if names else type(model).__name__ + ' has'}: "
            f"{', '.join(names or _adaptable_names(model)) or 'no linear modules'}"
        )


def _below(path: str, module: nn.Module) -> list[str]:
    return [f"{path}.{name}" for name, _ in module.named_modules() if name]


def _unknown_target(target: str, model: nn.Module) -> str:
    known = _adaptable_names(model)
    message = f"lora.target_modules: {target!r} is no linear module of {type(model).__name__}"
    if not known:
        return f"{message}; it has none (torch.nn.Linear) apart from its output embedding"
    message += f"; it has: {', '.join(known)}"
    nearest = difflib.get_close_matches(target, known, n=1)
    return f"{message}; did you mean {nearest[0]!r}?" if nearest else message


def _adaptable_names(model: nn.Module) -> list[str]:
    """Last parts of the paths of all linear modules but the output embedding, in the model's order."""
    head = _output_head(model)
    return list(
        dict.fromkeys(
            path.rpartition(".")[2]
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        )
    )


def _output_head(model: nn.Module) -> nn.Module | None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head if isinstance(head, nn.Module) else None


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path of the model."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def check_same_modules(adapter: Mapping[str, object], targets: Mapping[str, object]) -> None:
    """Check that an adapter holds the target modules, in their order.

    Raises:
        AdapterError: it does not.
    """
    if list(adapter) != list(targets):
        raise AdapterError(
            f"the adapter must hold the {len(targets)} target modules of the base in order, got {len(adapter)} modules"
        )
