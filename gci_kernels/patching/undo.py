"""Records what patch changes in a model, and restores the plain model bit for bit."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from gci_kernels.class_swap import Swapped, add_mixin, from_parts, give_class, parts_of
from gci_kernels.models import parents
from gci_kernels.models.targets import matched
from gci_kernels.tuners.merging import ExactMerge, inside_attention

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN_VALUES = (bool, int, float, str, list, tuple, dict, set, type(None))


class _Absent:
    """Stands for an attribute or key that does not exist."""


class Snapshot:
    """The state of a module tree before an adapter of `config`, if there is one, changes it.

    It holds the parameters' `data`, which costs no memory: where a parameter's `data` is replaced, the old values are
    still here. Only the parameters that adding the adapter overwrites in place are copied.
    """

    def __init__(self, model: nn.Module, config: PeftConfig | None) -> None:
        self.states: list[tuple[nn.Module, type, dict[str, Any]]] = [
            (module, type(module), {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
            for module in model.modules()
        ]
        self.values = {id(p): p.data for p in model.parameters() if _is_plain_tensor(p)}
        self.copies = {id(p): p.detach().clone() for p in _rewritten_in_place(model, config) if _is_plain_tensor(p)}
        self.trained = {id(parameter) for parameter in _trained_base_parameters(model, config)}
        self.flags = [(module, name, p.requires_grad) for module, name, p in self.parameters()]
        self.configs = [
            (config, {k: copy.deepcopy(v) if isinstance(v, _PLAIN_VALUES) else v for k, v in vars(config).items()})
            for config in _configs(model)
        ]

    def parameters(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """The parameters that the modules had, with their names in them."""
        for module, _, state in self.states:
            yield from ((module, name, p) for name, p in state["_parameters"].items() if p is not None)

    def changes(self) -> list[tuple[nn.Module, str, Any, Any, Any]]:
        """(module, attribute, key or None, old value, present value) of all that is not the same object now."""
        changes: list[tuple] = []
        for module, cls, before in self.states:
            if type(module) is not cls:
                changes.append((module, "__class__", None, parts_of(cls), parts_of(type(module))))  # can be pickled
            for attribute, old, new in _differences(before, vars(module)):
                if isinstance(old, dict) and isinstance(new, dict):
                    changes += [(module, attribute, *each) for each in _differences(old, new)]
                else:
                    changes.append((module, attribute, None, old, new))
        return changes

    def rewritten(self) -> Iterator["Weight"]:
        """The parameters that have been given other memory, or whose values differ from their copies."""
        for module, name, parameter in self.parameters():
            old, copied = self.values.get(id(parameter)), self.copies.get(id(parameter))
            if copied is not None and not torch.equal(parameter.data, copied):
                yield Weight(module, name, parameter, copied, copied=True)
            elif old is not None and not _same_memory(parameter.data, old):
                yield Weight(module, name, parameter, old, copied=False)


@dataclass(frozen=True)
class Weight:
    """A parameter of a module, and the values that it had before."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    old: Tensor
    copied: bool  # the old values are a copy, for the parameter's memory was written to

    def restore(self) -> None:
        """Restores the old values, on the device and in the dtype to which the patched model has been moved since."""
        now = getattr(self.module, self.name, self.parameter)
        vars(self.module).pop(self.name, None)  # PEFT puts a plain tensor there for the time of a merge
        parameter = self.module._parameters[self.name] = self.parameter
        parameter.grad = None
        same = (parameter.shape, parameter.device, parameter.dtype) == (self.old.shape, now.device, now.dtype)
        if self.copied and same:
            parameter.data.copy_(self.old)
        else:
            parameter.data = self.old.to(now.device, now.dtype)


class Undo:
    """Undoes what has been changed since a snapshot: at once, or when unpatch is called.

    Parameters of the plain model that training will change are copied here.

    Args:
        before: the snapshot.
    """

    def __init__(self, before: Snapshot) -> None:
        self.plain = [(module, dict(state["_modules"]), state["training"]) for module, _, state in before.states]
        self.flags = before.flags
        self.shapes = [(m, name, tuple(p.shape)) for m, name, p in before.parameters() if _is_plain_tensor(p)]
        self.sizes = [(config, old["vocab_size"]) for config, old in before.configs if "vocab_size" in old]
        self.changes: list[tuple] = []
        self.configs: list[tuple[Any, str, Any]] = []
        self.weights: list[Weight] = []
        self.blocked: str | None = None
        self.extend(before)

    def extend(self, before: Snapshot) -> None:
        """Adds what has been changed since another, later snapshot."""
        known = {id(module) for module, _, _ in self.plain}
        self.changes += [change for change in before.changes() if id(change[0]) in known]
        for config, values in before.configs:
            changed = _differences(values, vars(config))
            self.configs += [(config, key, old) for key, old, new in changed if not _equal(old, new)]
        copies = (
            Weight(module, name, parameter, parameter.detach().clone(), copied=True)
            for module, name, parameter in before.parameters()
            if id(parameter) in before.trained
        )
        recorded = {(id(weight.module), weight.name) for weight in self.weights}
        for weight in (*before.rewritten(), *copies):
            if id(weight.module) in known and (key := (id(weight.module), weight.name)) not in recorded:
                recorded.add(key)
                self.weights.append(weight)

    def apply(self) -> None:
        """Restores everything. What others have added since, such as hooks, stays."""
        for module, attribute, key, old, _ in reversed(self.changes):
            if attribute == "__class__":
                give_class(module, from_parts(*old))
            elif key is None:
                _restore(vars(module), attribute, old)
            else:  # dictionaries are changed in place: hook handles hold on to them
                _restore(vars(module)[attribute], key, old)
        for module, children, training in self.plain:
            module._modules.update(children)
            module.training = training
        for weight in self.weights:
            weight.restore()
        for module, name, flag in self.flags:
            if isinstance(parameter := module._parameters.get(name), nn.Parameter):
                parameter.requires_grad_(flag)
        for config, key, old in reversed(self.configs):
            _restore(vars(config), key, old)

    def obstacle(self, model: nn.Module) -> str | None:
        """Why :meth:`apply` would not restore the plain model, or None; `model` is what the tuner holds."""
        names = {id(module): name for name, module in model.named_modules()}
        return self.blocked or self._resized(names) or self._replaced(names) or _lost_hooks(model) or _rounded(model)

    def _replaced(self, names: dict[int, str]) -> str | None:
        patched = {(id(module), key): new for module, attribute, key, _, new in self.changes if attribute == "_modules"}
        wrapped = sum(map(_is_wrapper, patched.values()))
        unwrapped = 0
        for module, children, _ in self.plain:
            for name, old in children.items():
                now, by_patch = module._modules.get(name, _Absent), patched.get((id(module), name))
                unwrapped += now is old and _is_wrapper(by_patch)
                if now is not old and now is not by_patch and not _wraps(now, old) and not _equal_modules(now, old):
                    path = f"{names.get(id(module), '')}.{name}".lstrip(".")
                    return f"{path} is another module than patch() left there: put that back first"
        if wrapped and unwrapped == wrapped:
            return (
                "its adapters have been taken out already: what unload() or merge_and_unload() returned is the model, "
                "and after merging its weights are no longer the plain model's"
            )
        for module, attribute, _, old, new in self.changes:
            if attribute == "__class__" and parts_of(type(module)) not in (old, new):
                path = names.get(id(module)) or type(module).__name__
                return f"{path} has been given another class since (FSDP does that)"
        return None

    def _resized(self, names: dict[int, str]) -> str | None:
        for module, name, shape in self.shapes:
            parameter = module._parameters.get(name)
            now = None if parameter is None else tuple(getattr(parameter, "ds_shape", parameter.shape))
            if now is not None and _is_plain_tensor(parameter) and now != shape:
                path = f"{names.get(id(module), '')}.{name}".lstrip(".")
                return (
                    f"{path} had shape {list(shape)} when the model was patched and has {list(now)} now: bring it "
                    "back to that size first (resize_token_embeddings)"
                )
        for config, size in self.sizes:
            if (now := vars(config).get("vocab_size")) != size:
                return (
                    f"the config's vocab_size was {size} when the model was patched and is {now} now: call "
                    f"resize_token_embeddings({size}) first"
                )
        return None


def unmerge(model: nn.Module) -> None:
    """Unmerges all adapters of the model."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            with onload_layer(module):  # where accelerate has offloaded its weights
                module.unmerge()


class UndoableTuner(Swapped):
    """Mixin for the tuner of a model that patch made from a plain one: adapters added later are undone as well."""

    _gci_undo: Undo
    peft_config: dict[str, PeftConfig]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's; what it changes is recorded too."""
        config = self.peft_config[adapter_name]
        merged = any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules())
        before = Snapshot(model, config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            parents.disable_fast_paths(model)
        finally:
            if merged and next(before.rewritten(), None) is not None:
                self._gci_undo.blocked = (
                    f"adapter {adapter_name!r} rewrote base weights into which another adapter was merged"
                )
            self._gci_undo.extend(before)


def make_undoable(tuner: Any, undo: Undo) -> None:
    """Attaches `undo` to PEFT's `tuner`, and makes its LoRA layers merge in a way that can be undone exactly."""
    tuner._gci_undo = undo
    add_mixin(tuner, UndoableTuner)
    merged_by_peft = inside_attention(tuner.model)
    for module in tuner.model.modules():
        inexact = isinstance(module, lora.LoraLayer) and not isinstance(module, (ExactMerge, MultiheadAttention))
        if inexact and id(module) not in merged_by_peft:
            add_mixin(module, ExactMerge)


def _rewritten_in_place(model: nn.Module, config: PeftConfig | None) -> list[nn.Parameter]:
    """The base weights that initialising an adapter overwrites in place; other initialisations replace them."""
    if not isinstance(config, lora.LoraConfig) or str(config.init_lora_weights).lower() != "olora":
        return []
    return [p for base in matched(model, config).values() if (p := base._parameters.get("weight")) is not None]


def _trained_base_parameters(model: nn.Module, config: PeftConfig | None) -> list[nn.Parameter]:
    """The plain model's own parameters that training an adapter of `config`, or a call, changes."""
    if not isinstance(config, lora.LoraConfig):
        return []
    targets = matched(model, config)
    found = {"all": [*model.modules()], "lora_only": [*targets.values()]}.get(config.bias, [])
    changing = [
        p for module in found for name, p in module._parameters.items() if p is not None and name.endswith("bias")
    ]
    for module in targets.values():  # PEFT merges into these for each call, and unmerging rounds
        if isinstance(module, nn.MultiheadAttention):
            changing += [p for part in (module, module.out_proj) for p in part._parameters.values() if p is not None]
    return changing


def _lost_hooks(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if _is_wrapper(module) and any(vars(module).get(hooks) for hooks in _HOOKS):
            return (
                f"{name} is an adapter's layer and has hooks, which would be lost with it: remove them first, or "
                "register them on its base layer"
            )
    return None


def _rounded(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        exact = getattr(module, "unmerges_exactly", False) or isinstance(module, TrainableTokensLayer)
        rounded = getattr(module, "gci_rounded", False)
        if isinstance(module, BaseTunerLayer) and (rounded or (module.merged and not exact)):
            return (
                f"an adapter was merged into the base layer of {name}, which unmerging gives back rounded: load the "
                "plain model anew"
            )
    return None


def _is_wrapper(module: Any) -> bool:
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _wraps(module: Any, plain: Any) -> bool:
    """Whether `module` is one or several layers of PEFT around `plain`."""
    while _is_wrapper(module):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer
        if module is plain:
            return True
    return False


def _equal_modules(now: Any, old: nn.Module) -> bool:
    """Whether one may replace the other: an output layer resized twice is another module with the same values."""
    if type(now) is not type(old):
        return False
    tensors, others = now.state_dict(), old.state_dict()
    return tensors.keys() == others.keys() and all(torch.equal(t, others[name]) for name, t in tensors.items())


def _is_plain_tensor(parameter: Any) -> bool:
    """Whether a parameter is not quantised, sharded or on the meta device: only then rewriting shows in its memory."""
    return type(parameter) is nn.Parameter and parameter.layout is torch.strided and not parameter.is_meta


def _same_memory(a: Tensor, b: Tensor) -> bool:
    same = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return same and a.shape == b.shape and a.storage_offset() == b.storage_offset()


def _configs(model: nn.Module) -> list[Any]:
    """The model's configs and those within them, each once."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if isinstance(config, (PretrainedConfig, GenerationConfig)) and id(config) not in found:
            found[id(config)] = config
            for value in vars(config).values():
                add(value)

    for module in model.modules():
        for name in ("config", "generation_config"):
            add(vars(module).get(name))
    return list(found.values())


def _differences(old: dict, new: dict) -> Iterator[tuple[Any, Any, Any]]:
    """(key, old value, new value) of all that is not the same object in two dictionaries; _Absent for what is not."""
    for key in old.keys() | new.keys():
        before, after = old.get(key, _Absent), new.get(key, _Absent)
        if before is not after:
            yield key, before, after


def _restore(container: dict, key: Any, old: Any) -> None:
    if old is _Absent:
        container.pop(key, None)
    else:
        container[key] = old


def _equal(old: Any, new: Any) -> bool:
    return isinstance(old, _PLAIN_VALUES) and type(old) is type(new) and old == new
