"""Gives an object a subclass of its own class: what it is made of, its name and its copies stay as they were."""

import functools
from types import MethodType
from typing import Any, ClassVar


class Swapped:
    """Base of the mixins for :func:`subclass`: lets an instance of such a class be copied and pickled."""

    _gci_parts: ClassVar[tuple[type, type]]
    wrapped: ClassVar[tuple[str, ...]] = ("forward",)

    def __reduce_ex__(self, protocol):
        # The class is made while the program runs; its parts can be found by name, it cannot.
        _, _, *state = super().__reduce_ex__(2)
        return _new_instance, _importable(type(self)), *state


@functools.cache
def subclass(base: Any, mixin: Any) -> Any:
    """A subclass of `base` with the methods of `mixin` before its own, under the name of `base`; the same each time.

    `base` is given back by `_gci_parts[0]`. The name stays because transformers, accelerate and FSDP know classes by
    name, and the methods in `wrapped` keep their signature because they also look at that: those get the base's as
    their first argument after self.
    """
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    wrapped = {name: _wrap(getattr(base, name), getattr(mixin, name)) for name in mixin.wrapped if hasattr(mixin, name)}
    return type(base.__name__, (mixin, base), {**names, **wrapped, "_gci_parts": (base, mixin)})


def _wrap(base_method: Any, inner: Any) -> Any:
    @functools.wraps(base_method)
    def method(self, *args, **kwargs):
        return inner(self, base_method, *args, **kwargs)

    return method


def parts_of(cls: type) -> tuple[type, ...]:
    """The class that :func:`subclass` started from, and the mixins; of any other class, itself."""
    mixins: tuple[type, ...] = ()
    while "_gci_parts" in vars(cls):
        cls, mixin = cls._gci_parts  # type: ignore[attr-defined]
        mixins = (mixin, *mixins)
    return cls, *mixins


def from_parts(base: type, *mixins: type) -> type:
    """The class of these :func:`parts_of`."""
    return functools.reduce(subclass, mixins, base)


def _importable(cls: Any) -> tuple[type, ...]:
    """:func:`parts_of`, of a class derived from one of ours as well, which then is left out."""
    mixins: tuple[type, ...] = ()
    while issubclass(cls, Swapped):
        cls, mixin = cls._gci_parts
        mixins = (mixin, *mixins)
    return cls, *mixins


def give_class(instance: Any, cls: type) -> None:
    """Gives `instance` the class `cls`, and binds forwards that the instance holds to that of `cls`.

    accelerate's hooks keep the forward of the class that they found, and leave it on the instance when they go.
    """
    before = getattr(type(instance), "forward", None)
    instance.__class__ = cls
    for name in ("forward", "_old_forward"):
        if before is not None and getattr(vars(instance).get(name), "__func__", None) is before:
            vars(instance)[name] = MethodType(cls.forward, instance)  # type: ignore[attr-defined]


def _new_instance(base: type, *mixins: type):
    cls: Any = from_parts(base, *mixins)
    return cls.__new__(cls)
