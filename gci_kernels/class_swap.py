"""Gives an object a subclass of its own class: its attributes, its class's name and its copies stay as they were."""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, ClassVar

_AnyClass: Any = object  # type checkers do not know which class a mixin is mixed with


class Swapped(_AnyClass):
    """Base of the mixins for :func:`subclass`: an instance of such a class can be copied and pickled.

    Attributes:
        wrapped: the methods of the mixin that get the base class's method as their first argument after self.
        own: attributes of the instance that :func:`remove_mixin` removes with the mixin.
    """

    _gci_parts: ClassVar[tuple[type, type]]
    wrapped: ClassVar[tuple[str, ...]] = ("forward",)
    own: ClassVar[tuple[str, ...]] = ()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # pickle finds classes by name, and this one is made while the program runs; its parts are found.
        _, _, *state = super().__reduce_ex__(2)
        return _new_instance, parts_of(type(self), derived=True), *state


@functools.cache
def subclass(base: Any, mixin: Any) -> Any:
    """A subclass of `base` with the methods of `mixin` before its own, under the name of `base`; made once and cached.

    Its `_gci_parts` are (base, mixin). transformers, accelerate and FSDP look classes up by name and read the
    signatures of forwards, so both stay the base's.
    """
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    wrapped = {name: _wrap(getattr(base, name), getattr(mixin, name)) for name in mixin.wrapped if hasattr(mixin, name)}
    return type(base.__name__, (mixin, base), {**names, **wrapped, "_gci_parts": (base, mixin)})


def _wrap(base_method: Any, inner: Any) -> Callable[..., Any]:
    @functools.wraps(base_method)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(self, base_method, *args, **kwargs)

    return method


def parts_of(cls: Any, derived: bool = False) -> tuple[type, ...]:
    """The class that :func:`subclass` was first given, and the mixins; for any other class (cls,).

    With `derived` a class that others have derived from one of ours counts as that one.
    """
    mixins: tuple[type, ...] = ()
    while issubclass(cls, Swapped) if derived else "_gci_parts" in vars(cls):
        cls, mixin = cls._gci_parts
        mixins = (mixin, *mixins)
    return cls, *mixins


def from_parts(base: type, *mixins: type) -> type:
    """The class whose :func:`parts_of` are `base` and `mixins`."""
    return functools.reduce(subclass, mixins, base)


def give_class(instance: Any, cls: Any) -> None:
    """Gives `instance` the class `cls`, and rebinds forwards that are stored on the instance to that of `cls`.

    accelerate's hooks store the class's forward on the instance, and leave it there when they are removed.
    """
    before = getattr(type(instance), "forward", None)
    instance.__class__ = cls
    for name in ("forward", "_old_forward"):
        if before is not None and getattr(vars(instance).get(name), "__func__", None) is before:
            vars(instance)[name] = MethodType(cls.forward, instance)


def add_mixin(instance: Any, mixin: type) -> None:
    """Puts the methods of `mixin`, a :class:`Swapped`, before those of the instance's class."""
    base: Any = type(instance)
    give_class(instance, subclass(base, mixin))


def remove_mixin(instance: Any) -> None:
    """Undoes the last :func:`add_mixin`."""
    base, mixin = type(instance)._gci_parts
    give_class(instance, base)
    for name in mixin.own:
        vars(instance).pop(name, None)


def _new_instance(base: type, *mixins: type) -> Any:
    cls: Any = from_parts(base, *mixins)
    return cls.__new__(cls)
