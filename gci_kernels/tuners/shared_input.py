"""Finds adapted layers that are given the same tensor, and lets them share their passes over it.

q, k and v of a decoder layer get one x, and so do gate and up. Forwards with gradients are watched: layers that were
given the same tensor one after another become a group. From then on the first of them that is called, the leader,
computes all of them in one op (ops/bottleneck/shared_input.py), and the others find their outputs ready. An output is
taken only where the layer's own call has the very operands with which the leader computed it: the same tensors, not
changed since, and the same settings. Any other call is computed by itself, and a group whose output was not asked for
is given up. Groups are kept beside the layers, which stay as they are: names, copies and pickles know nothing of them.

Activation checkpointing runs a part of the forward again in backward and demands that it saves the same tensors.
Therefore groups are made and given up only when a forward of a PeftModel begins, and no graph that may be run again,
one whose tensors pass through hooks of saved tensors, waits for its backward.
"""

import contextlib
import functools
import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gci_kernels.ops.arguments import new_record
from gci_kernels.ops.bottleneck import adapted_linears
from gci_kernels.ops.bottleneck.autograd import keep_until_backward
from gci_kernels.ops.bottleneck.shared_input import Arguments
from gci_kernels.ops.transforms import PLAIN, dispatch_mode_depth

_graph_task = torch._C._current_graph_task_id  # of the backward that runs in this thread; -1: none runs
_hooks_before_all = torch.nn.modules.module._global_forward_pre_hooks
_hooks_after_all = torch.nn.modules.module._global_forward_hooks
_saving_hooks = functools.partial(torch._C._autograd._top_saved_tensors_default_hooks, False)


class _Group:
    """Layers that are given the same tensor, in the order of their calls; the first leads.

    Where one of them did not ask for its output, all are computed by themselves as long as they live.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = [weakref.ref(layer) for layer in layers]
        self.given_up = False

    def is_dead(self) -> bool:
        """Whether one of the layers is gone; an id in it may be that of another layer by now."""
        return any(layer() is None for layer in self.layers)


class _Token:
    """Is alive as long as a graph waits for its backward, in which a part of a forward may run again."""


class _Run(NamedTuple):
    """Layers that were called one after another with the same tensor."""

    x: weakref.ref
    conditions: tuple
    layers: list[Any]


class _Ready(NamedTuple):
    """A layer's output, before the layer is called."""

    arguments: Arguments
    versions: list[tuple[int, int]]
    made: tuple[Tensor, Any]


class _Waiting(NamedTuple):
    """The outputs that a leader computed for the other layers of its group, by the layers' ids."""

    x: Tensor
    conditions: tuple
    group: _Group
    ready: dict[int, _Ready]


class _State:
    """What one thread is doing."""

    def __init__(self) -> None:
        self.forward: _Forward | None = None
        self.waiting: _Waiting | None = None
        self.cleared_after = -1  # the backward at whose end `waiting` will be dropped

    def drop(self) -> None:
        """Forgets what was not asked for."""
        self.waiting = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.state = _State()


_thread = _Thread()
_groups: dict[int, _Group] = {}  # by the ids of their layers
# Changes for the next quiet moment, and what makes a moment unquiet.
_lock = threading.Lock()
_found: dict[tuple[int, ...], list[weakref.ref]] = {}  # by the ids of the layers
_given_up: list[_Group] = []
_running: set["_Forward"] = set()
_tokens: "weakref.WeakSet[_Token]" = weakref.WeakSet()


def share(layer: Any, arguments: Arguments) -> tuple[tuple[Tensor, Any] | None, Any]:
    """What :func:`~gci_kernels.ops.bottleneck.adapted_linear` asks when `layer`, a FusedLayer, calls it."""
    x, state = arguments[0][0], _thread.state
    if type(x) not in PLAIN or dispatch_mode_depth() > 0 or x.is_inference() or x.is_meta:
        return None, None
    # What has to be equal between calls that share x, beside the operands. Hooks of saved tensors differ between
    # regions of checkpointing, which run again one by one.
    hooks, device = _saving_hooks(), x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    stream = torch.cuda.current_stream(x.device) if device == "cuda" else None
    conditions = None if hooks is None else hooks[0], autocast, stream, x._version, x.data_ptr(), x.shape
    if state.waiting is not None and (made := _take(state, layer, arguments, conditions)) is not None:
        return made, None
    group, forward = _groups.get(id(layer)), state.forward
    if group is not None and not group.given_up and group.layers[0]() is layer:
        made = _lead(state, group, arguments, conditions)
        if made is not None:
            return made, None
    elif group is None and forward is not None:
        last = forward.runs[-1] if forward.runs else None
        if last is not None and last.x() is x and last.conditions == conditions:
            last.layers.append(layer)
        else:
            forward.runs.append(new_record(_Run, (weakref.ref(x), conditions, [layer])))
    return None, None if hooks is None else _token(state)


def _is_hooked(layer: Any) -> bool:
    """Whether hooks run beside the layer's call: they may change parameters or x, by `.data` even without a trace."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks or _hooks_before_all or _hooks_after_all)


def _takes(arguments: Arguments, x: Tensor) -> bool:
    """Whether the op for several layers takes a call with x."""
    (own, weight, bias, A, B, weights, segments, past, _), _, _, _, dropout_p, impl = arguments
    if own is not x or dropout_p or impl == "reference" or weight is None or past is not None:
        return False
    tensors = [t for t in (x, weight, bias, A, B, weights, segments) if t is not None]
    # A parameter in shards, or one that is being gathered, is of another type.
    if any(type(t) not in PLAIN or t.device != x.device for t in tensors):
        return False
    fits = x.dtype is weight.dtype or torch.is_autocast_enabled(x.device.type)
    return fits and x.is_floating_point() and x.shape[-1:] == A.shape[1:]


def _versions(arguments: Arguments) -> list[tuple[int, int]]:
    return [(t._version, t.data_ptr()) for t in arguments[0] if t is not None]


def _take(state: _State, layer: Any, arguments: Arguments, conditions: tuple) -> tuple[Tensor, Any] | None:
    """The output that is ready for this very call, or None."""
    waiting: Any = state.waiting
    if arguments[0][0] is not waiting.x:
        _give_up(state)
        return None
    ready = waiting.ready.pop(id(layer), None)
    if ready is None:
        return None
    same = conditions == waiting.conditions and arguments[1:] == ready.arguments[1:]
    if same and all(map(is_, arguments[0], ready.arguments[0])) and _versions(arguments) == ready.versions:
        if not waiting.ready:
            state.waiting = None
        return ready.made
    waiting.ready[id(layer)] = ready  # not asked for, and its group is given up
    _give_up(state)
    return None


def _give_up(state: _State) -> None:
    """Drops outputs that were not asked for, and their group; in backward checkpointing may stop before it asks."""
    if state.waiting is not None and state.waiting.ready and _graph_task() < 0:
        _given_up.append(state.waiting.group)
    state.waiting = None


def _lead(state: _State, group: _Group, arguments: Arguments, conditions: tuple) -> tuple[Tensor, Any] | None:
    """The output of the group's first layer, and those of the others kept ready; None where it is alone now."""
    x = arguments[0][0]
    _give_up(state)
    layers = [reference() for reference in group.layers]
    if not _takes(arguments, x) or any(layer is not None and _is_hooked(layer) for layer in layers):
        return None
    calls, members = [arguments], []
    for member in layers[1:]:
        find = getattr(member, "shared_arguments", None)  # None of a layer that was unpatched
        found = None if find is None else find(x)
        if found is not None and found[5] == arguments[5] and _takes(found, x):
            calls.append(found)
            members.append(member)
    if not members:
        return None
    first, *others = adapted_linears(calls)
    if conditions[0] is not None:
        keep_until_backward(first[0], _token(state))
    ready = {
        id(member): new_record(_Ready, (call, _versions(call), made))
        for member, call, made in zip(members, calls[1:], others, strict=True)
    }
    state.waiting = new_record(_Waiting, (x, conditions, group, ready))
    if (task := _graph_task()) >= 0 and task != state.cleared_after:
        state.cleared_after = task
        torch.autograd.Variable._execution_engine.queue_callback(state.drop)  # type: ignore[attr-defined]
    return first


def _token(state: _State) -> _Token | None:
    """What a graph holds whose parts may run again; None in backward, where they do."""
    if state.forward is not None:
        if state.forward.token is None:
            state.forward.token = _new_token()
        return state.forward.token
    return _new_token() if _graph_task() < 0 else None


def _new_token() -> _Token:
    token = _Token()
    _tokens.add(token)
    return token


def forward() -> contextlib.AbstractContextManager:
    """The context of one forward of a model; without gradients, and for a compiler, it does nothing."""
    ignored = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    return contextlib.nullcontext() if ignored else _Forward()


class _Forward(contextlib.AbstractContextManager):
    """One forward of a model with gradients, in this thread; layers that belong to no group are watched."""

    def __init__(self) -> None:
        self.before: _Forward | None = None
        self.token: _Token | None = None
        self.runs: list[_Run] = []

    def __enter__(self) -> None:
        with _lock:
            if not _running and not len(_tokens):
                _change()
            _running.add(self)
        state = _thread.state
        self.before, state.forward, state.waiting = state.forward, self, None

    def __exit__(self, kind: Any, *_: Any) -> None:
        state = _thread.state
        if kind is None:
            _give_up(state)
            _propose(self.runs)
        state.forward, state.waiting = self.before, None
        self.before, self.token, self.runs = None, None, []
        _running.discard(self)


def _propose(runs: list[_Run]) -> None:
    """Groups for the next quiet moment: the runs of several layers, of which none was called in another run."""
    times = Counter(each for key in {tuple(map(id, run.layers)) for run in runs} for each in key)
    for run in runs:
        key = tuple(map(id, run.layers))
        if len(key) > 1 and all(times[each] == 1 for each in key):
            _found[key] = [weakref.ref(layer) for layer in run.layers]


def _change() -> None:
    """Makes the groups that were found, and marks those that were given up."""
    while _given_up:
        _given_up.pop().given_up = True
    for key in [key for key, group in _groups.items() if group.is_dead()]:
        del _groups[key]
    while _found:
        ids, references = _found.popitem()
        layers = [reference() for reference in references]
        if None not in layers and not any(each in _groups for each in ids):
            _groups.update(dict.fromkeys(ids, _Group(layers)))
