"""One process of this machine at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds the lock of the file `path`, which is created, and waits while another process holds it.

    Where a file cannot be locked (on other systems than POSIX, in a folder that cannot be written, on a file system
    without locks), the process goes on as if it were the only one: it then repeats work, and loses nothing else.
    """
    with contextlib.ExitStack() as held:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(path.open("a"))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
