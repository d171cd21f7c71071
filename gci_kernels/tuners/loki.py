"""LoKI (arXiv 2505.22120) as the PEFT method GCI_LOKI: train some rows of a projection, keep all others."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gci_kernels.limits import MAX_DECODE_TOKENS
from gci_kernels.models import parents
from gci_kernels.ops.arguments import index_copy
from gci_kernels.ops.bottleneck import adapted_linear, choose_plan
from gci_kernels.ops.bottleneck.mixers import IDENTITY
from gci_kernels.ops.row_linear import MergedRows, adapted_row_linear, choose_form, padded
from gci_kernels.ops.transforms import transformed
from gci_kernels.tuners import fusion, hooks, mixed, sharding
from gci_kernels.tuners.base import AdaptedConfig, AdaptedLinear, AdaptedModel, check_integer, check_number, uniform
from gci_kernels.tuners.loki_positions import Positions, RowPositions, num_decoder_layers, resolve
from gci_kernels.tuners.methods import register_with_peft
from gci_kernels.tuners.scaling import applied


@dataclass
class LoKIConfig(AdaptedConfig):
    """Configuration of LoKI: chosen rows of each layer's last MLP projection are trained, and its bias there.

    Args:
        positions: the rows: a positions JSON as gci_kernels.loki.select and the published code write them, a scores
            file (with `quota`), a list of row indices for each decoder layer, or a mapping from layer numbers or module
            names to them. The rows are any list, range, set, array or tensor of integers; a layer with none is left as
            it is. Saved with the adapter's weights, not in its config.
        quota: percent of each layer's rows, for a scores file: those that gci_kernels.loki.select takes.
        r: None: the rows themselves are trained. A rank: LoKI*, the rows' change is scaling * B @ A, A [r, in] and
            B [k, r].
        lora_alpha: scaling = lora_alpha / r.
        target_modules: names (suffixes) or a regular expression of the projections, one in a decoder layer; None:
            down_proj or what the model calls it.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in peft.LoraConfig: the positions of
            modules that they leave out are not used. There are no rank_pattern and alpha_pattern: LoKI* has one rank.
        init_weights: True: the rows start as the model's own (B zeros); False: random, so that tests see an effect.
        keep_merged: keep, beside each adapted weight, a copy with the trained rows in it, which training then uses.
            False saves that memory; the products find the rows in other ways, at most some percent slower.
        rows, num_layers: how many rows each module has, and how many decoder layers the model; filled in.
    """

    positions: Positions | None = None
    quota: float | None = None
    r: int | None = None
    lora_alpha: float = 32
    init_weights: bool = True
    keep_merged: bool = True
    rows: dict[str, int] | None = None
    num_layers: int | None = None

    method: ClassVar[str] = "LoKI"
    for_mlps = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quota is not None:
            check_number("quota", self.quota, "above 0 and at most 100", math.nextafter(0, 1), 100)
        if self.r is not None:
            check_integer("r", self.r, 1)
        check_number("lora_alpha", self.lora_alpha, "a finite number")

    def to_dict(self) -> dict:
        """What is saved: all but where the positions came from; they stand beside the weights."""
        return super().to_dict() | {"positions": None, "quota": None}


class LoKILinear(AdaptedLinear):
    """A linear layer, some of whose rows are trained; its forward is :func:`gci_kernels.ops.loki_linear`.

    Under each adapter's name: positions [k], active [k, in] (LoKI*: A [r, in] and B [k, r]) and, where the base layer
    has a bias, active_bias [k]. Several active adapters must not share a row. B's name has "lora_B" in it, for LoRA+.
    """

    adapter_layer_names = ("loki_active", "loki_A", "loki_lora_B", "loki_active_bias")
    other_param_names = ("loki_positions", "r", "scaling", "loki_settings")
    settings_name = "loki_settings"
    former_names = {"loki_B": "loki_lora_B"}
    method_name = "LoKI"
    loki_active: nn.ParameterDict
    loki_A: nn.ParameterDict
    loki_lora_B: nn.ParameterDict
    loki_active_bias: nn.ParameterDict
    loki_positions: RowPositions

    def __init__(self, base_layer: nn.Module, name: str, keep_merged: bool) -> None:
        super().__init__(base_layer, name)
        self.loki_positions = RowPositions(self.out_features)
        self.merged_rows = MergedRows() if keep_merged else None
        self.disjoint: set[frozenset[str]] = set()  # sets of adapters that were found to share no row

    def update_layer(self, name: str, config: LoKIConfig, positions: Tensor) -> None:
        """Adds the adapter `name`, or makes it anew.

        Args:
            positions: [k] int64, -1 where a file that is loaded later has them.
        """
        base: Any = self.get_base_layer()
        base_rows, k, r = self._base_rows(), positions.shape[0], config.r
        device = base_rows.device
        self.r[name], self.scaling[name] = r or 0, config.lora_alpha / (r or 1)
        self.loki_positions[name] = positions.to(device)
        rows = positions.clamp(min=0).to(device)
        if r is None:
            active = base_rows.index_select(0, rows)
            self.loki_active[name] = nn.Parameter(active if config.init_weights else uniform(*active.shape).to(active))
        else:
            self.loki_A[name] = nn.Parameter(uniform(r, self.in_features))
            self.loki_lora_B[name] = nn.Parameter(torch.zeros(k, r) if config.init_weights else uniform(k, r))
        if base.bias is not None:
            self.loki_active_bias[name] = nn.Parameter(base.bias.detach().index_select(0, rows))
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _base_rows(self) -> Tensor:
        """The base layer's weight, dequantised, as [out, in]."""
        base: Any = self.get_base_layer()
        with hooks.onloaded(base):
            weight = dequantised_weight(base).detach()
        return weight.t() if isinstance(base, Conv1D) else weight

    def _base_bias(self) -> Tensor:
        base: Any = self.get_base_layer()
        with hooks.onloaded(base):
            return base.bias() if callable(base.bias) else base.bias  # torch.ao's quantised layers have a method

    def _adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        base: Any = self._modules["base_layer"]
        if len(names) != 1:
            if not names:
                return base(x)
            self._check_disjoint(names)
        if hooks.HOOK in base.__dict__ and (moved := hooks.devices(base, x)) is not None:
            return self._adapted(x.to(moved[0]), names).to(moved[1])
        weight, bias, product = fusion.base_operands(base, x)
        # In a decoding step the cheapest way is to overwrite columns of the base product, which no one else holds.
        in_place = (
            product is None and self.gci_impl == "auto"
            and not torch.is_grad_enabled() and fusion.takes_steps("auto", x)
        )  # fmt: skip
        first, *others = names
        if weight is not None and (self.r[first] or not in_place):
            y = self._fused(x, weight, bias, first)
        else:
            if product is None:
                plain = type(base) is nn.Linear
                product = F.linear(x, weight, bias) if plain and weight is not None else base(x)
            y = self._replace_columns(product, x, first, in_place)
        for name in others:
            y = self._replace_columns(y, x, name, in_place)
        return y

    def _mixed(self, x: Tensor, mix: mixed.MixedBatch) -> Tensor:
        mix.check(x, self)
        return mixed.combine(self.base_layer, x, mixed.Tokens(x, mix.names, self.r), self._replace_samples, None)

    def _replace_samples(self, y: Tensor, x: Tensor, name: str, samples: Tensor) -> Tensor:
        """y [inputs, tokens, out] with the adapter's columns in the rows `samples`."""
        changed = self._replace_columns(y.index_select(0, samples), x.index_select(0, samples), name, in_place=False)
        return index_copy(y, 0, samples, changed)

    def _fused(self, x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        """The adapted layer in one op, which reads the base layer's weight [out, in] and bias [out]."""
        rows: Any = self._modules["loki_positions"]
        positions = rows.require(name)
        active_bias = self.parameter("loki_active_bias", name) if bias is not None else None
        if not self.r[name]:
            active = self.parameter("loki_active", name)
            merged = self._merged_rows()
            return adapted_row_linear(x, weight, bias, active, positions, active_bias, merged, self.gci_impl)
        if bias is not None and active_bias is not None:
            bias = index_copy(bias, 0, positions, active_bias.to(bias.dtype))
        return self._low_rank(x, weight, bias, name)

    def _merged_rows(self) -> MergedRows | None:
        """The layer's copy of the weight, where one may be kept; none of a weight that is whole for a call alone."""
        merged = self.merged_rows
        if merged is None or not sharding.is_gathered(self._modules["base_layer"]):  # type: ignore[arg-type]
            return merged
        merged.drop()  # of the time before it was divided
        return None

    def _low_rank(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, name: str) -> Tensor:
        """LoKI*'s update, with the base product where a weight is given."""
        scaling, B = self.scaling[name], self.parameter("loki_lora_B", name)
        # [out, r], with zeros in the rows that are not trained
        B = index_copy(B.new_zeros(self.out_features, B.shape[1]), 0, self.loki_positions.require(name), B)
        if type(scaling) is not float:
            scaling, B = applied(scaling, B)
        operands = x, weight, bias, self.parameter("loki_A", name), B, None, None, None, None
        return adapted_linear(operands, IDENTITY, (), scaling, 0.0, self.gci_impl)[0]

    def _replace_columns(self, y: Tensor, x: Tensor, name: str, in_place: bool) -> Tensor:
        """y [..., out], the base product, with the adapter's columns in place of the base layer's."""
        rows: Any = self._modules["loki_positions"]
        biases: Any = self._modules["loki_active_bias"]
        positions = rows.require(name)
        active_bias = self.parameter("loki_active_bias", name).to(y.dtype) if name in biases else None
        if not self.r[name]:
            active = self.parameter("loki_active", name).to(y.dtype)
            columns = _linear(x.to(y.dtype), active, active_bias).to(y.dtype)
            return y.index_copy_(-1, positions, columns) if in_place else index_copy(y, -1, positions, columns)
        y = y + self._low_rank(x, None, None, name).to(y.dtype)
        if active_bias is None:
            return y
        change = active_bias - self._base_bias().index_select(0, positions).to(y.dtype)
        return y.index_add(-1, positions, change.expand(*y.shape[:-1], -1))

    def _check_disjoint(self, names: Sequence[str]) -> None:
        """ValueError where two of the adapters train the same row."""
        if len(names) < 2:
            return
        if torch.compiler.is_exporting():  # the rows have no values there
            if frozenset(names) not in self.disjoint:
                raise ValueError(f"adapters {names} are active together: run the model once before its graph is made")
            return
        rows = torch.cat([self.loki_positions.require(name) for name in names])
        if rows.unique().numel() < rows.numel():
            self.disjoint.discard(frozenset(names))
            raise ValueError(f"adapters {names} train some of the same rows: they cannot be active together")
        self.disjoint.add(frozenset(names))

    _check_merge = _check_disjoint

    def _merged(self, name: str, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The rows, in the base weight's dtype, and their bias as they are computed with."""
        positions = self.loki_positions.require(name)
        new = {"bias": self.parameter("loki_active_bias", name)} if name in self.loki_active_bias else {}
        if not self.r[name]:
            return positions, new | {"weight": self.parameter("loki_active", name).to(weight.dtype)}
        wide = torch.promote_types(weight.dtype, torch.float32)
        scaling, B = applied(self.scaling[name], self.parameter("loki_lora_B", name).to(wide))
        change = scaling * (B @ self.parameter("loki_A", name).to(wide))
        return positions, new | {"weight": (weight[positions].to(wide) + change).to(weight.dtype)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoKILinear":
        if self.merged_rows is not None:
            self.merged_rows.drop()  # before, so that a move does not hold two copies
        return super()._apply(fn, recurse)

    def settings_of(self, config: LoKIConfig) -> dict[str, float]:
        """What an adapter of `config` computes with here and its tensors' shapes do not show."""
        # Positions of a narrower model fit into a wider one.
        return {"out_features": self.out_features} | ({"lora_alpha": config.lora_alpha} if config.r else {})

    def describe(self, name: str) -> str:
        """How many rows adapter `name` trains, and LoKI*'s rank."""
        rank = f", r={self.r[name]}" if self.r[name] else ""
        return f"{self.loki_positions[name].shape[0]} of {self.out_features} rows{rank}"

    def plan(self, tokens: int, dtype: torch.dtype, device_type: str) -> str:
        """What the layer runs for x [tokens, in]; ValueError where its `impl` cannot run."""
        name = next(iter(self.adapters() or self.r))
        if self.r[name]:
            impl = self.gci_impl
            return str(choose_plan(impl, tokens=tokens, dtype=dtype, device_type=device_type, mixer=IDENTITY.name))
        if fusion.obstacle(self.base_layer) is not None:
            return "rows=replaced"  # in what the base layer returns
        share = self.loki_positions[name].shape[0] / self.out_features
        keep = self.merged_rows is not None and not sharding.is_gathered(self.base_layer)
        form = choose_form(self.gci_impl, tokens=tokens, share=share, dtype=dtype, device_type=device_type, keep=keep)
        return f"rows={form}"


def _linear(x: Tensor, active: Tensor, bias: Tensor | None) -> Tensor:
    """x @ active.T + bias, [..., k]; rows of zeros are added to `active` [k, in] where a GPU's products need them.

    That copies `active`, which for a few tokens takes longer than the product; an exported graph is for any number.
    """
    k = active.shape[0]
    more = padded(k, x.device.type) - k
    if more and not transformed() and x.numel() > MAX_DECODE_TOKENS * x.shape[-1]:
        active, bias = F.pad(active, (0, 0, 0, more)), None if bias is None else F.pad(bias, (0, more))
    return F.linear(x, active, bias)[..., :k]


def dequantised_weight(base: Any) -> Tensor:
    """The weight of a linear layer as PEFT's dequantize_module_weight gives it; it works on a CPU too."""
    kind = type(getattr(base, "weight", None)).__name__
    if kind == "Int8Params":
        # dequantize_module_weight would then put the weight on its device anew, which loses its scales on a CPU.
        return dequantize_bnb_weight(base.weight, state=base.state)
    if kind == "Params4bit" and getattr(base.weight.quant_state, "packing_format_for_cpu", False):
        base.state_dict()  # gives what inference packed for the CPU the layout back that can be dequantised
    return dequantize_module_weight(base)


def _match(config: LoKIConfig, targets: set[str], name: str) -> Any:
    """PEFT's answer whether `targets`, and the config's other fields that choose modules, match the module `name`."""
    config = copy.copy(config)
    config.target_modules = targets
    return check_target_module_exists(config, name)


class LoKIModel(AdaptedModel):
    """PEFT's tuner for GCI_LOKI. Made by get_peft_model, PeftModel.from_pretrained or gci_kernels.patch."""

    prefix = "loki_"
    tuner_layer_cls = LoKILinear

    def _renamed(self, config: LoKIConfig) -> bool:
        return config.r is not None

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Finds the modules and their rows; from a saved config only how many, for their numbers are loaded later."""
        super()._prepare_model(peft_config, model)
        self.rows = self._find_rows(peft_config, model)
        parents.refuse(model, "LoKI", self.rows, "leave it out of positions and target_modules")

    def _find_rows(self, peft_config: Any, model: nn.Module) -> dict[str, Tensor]:
        if peft_config.positions is not None:
            found = resolve(peft_config.positions, peft_config.quota, peft_config.target_modules, model)
            rows = {n: each for n, each in found.items() if _match(peft_config, {n.rpartition(".")[2]}, n)}
            if not rows:
                raise ValueError("exclude_modules and layers_to_transform leave no module that has positions")
            peft_config.rows = {name: len(each) for name, each in rows.items()}
            peft_config.num_layers = num_decoder_layers(model)
            return rows
        if peft_config.rows is None:
            raise ValueError("positions must be given: a file, a list for each decoder layer, or a mapping")
        unknown = set(peft_config.rows) - {name for name, _ in model.named_modules()}
        if unknown:
            raise ValueError(f"this adapter is of another model: here are no modules {', '.join(sorted(unknown))}")
        if peft_config.num_layers not in (None, num_decoder_layers(model)):
            raise ValueError(
                f"this adapter is of another model: of {peft_config.num_layers} decoder layers, here are "
                f"{num_decoder_layers(model)}"
            )
        return {name: torch.full((count,), -1) for name, count in peft_config.rows.items()}

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        # Of all others it says whether they are excluded: PEFT warns where nothing is.
        return key in peft_config.rows or _match(peft_config, set(), key)

    def _new_layer(self, target: nn.Module, name: str, config: LoKIConfig, key: str) -> LoKILinear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if fusion.computes_otherwise(base):
            raise ValueError(
                f"LoKI cannot adapt {key}: a {type(base).__name__} computes something else than x @ W.T + b, which the "
                "rows of W alone cannot repeat; leave it out of positions, or use LoRA or LoRAMoE"
            )
        return LoKILinear(target, name, config.keep_merged)

    def _update_layer(self, layer: LoKILinear, name: str, config: LoKIConfig, key: str) -> None:
        layer.update_layer(name, config, self.rows[key])


register_with_peft(LoKIConfig, LoKIModel)
