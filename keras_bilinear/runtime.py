"""What is going to run the operations that layers make: Keras' backend, or LiteRT."""

import contextlib
import contextvars
from collections.abc import Iterator

from keras import backend

LITERT = "litert"
_RUNTIME = contextvars.ContextVar("runtime", default="")


def runtime() -> str:
    """`"tensorflow"`, `"jax"` or `"torch"`, or `"litert"` while a model is traced for it."""
    return _RUNTIME.get() or backend.backend()


@contextlib.contextmanager
def traced_for_litert() -> Iterator[None]:
    """Within it layers make the operations that are fastest, and smallest, in LiteRT."""
    token = _RUNTIME.set(LITERT)
    try:
        yield
    finally:
        _RUNTIME.reset(token)
