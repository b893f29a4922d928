"""Where the operations that layers make are going to run: on Keras' backend, or from a file.

`runtime`, `on_gpu`, `convolution_library`, `differentiable` and `holds_integers` tell; `exporting`
is the context in which they run from a file.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import keras
from keras import backend

EXPORTED = "exported"
_RUNTIME = contextvars.ContextVar("runtime", default="")
_INTEGERS = contextvars.ContextVar("integers", default=False)


def runtime() -> str:
    """`"tensorflow"`, `"jax"` or `"torch"`, or `"exported"` while a model is traced for a file."""
    return _RUNTIME.get() or backend.backend()


def convolution_library() -> str:
    """What computes convolutions on a CPU: the backend or `"onednn"` where TensorFlow has it do so.

    TensorFlow takes Intel's oneDNN by itself on some CPUs only, and where
    `TF_ENABLE_ONEDNN_OPTS=1` asks for it.
    """
    if backend.backend() != "tensorflow":
        return backend.backend()
    try:  # TensorFlow has no public name for this.
        from tensorflow.python.util._pywrap_util_port import IsMklEnabled
    except ImportError:
        return "tensorflow"
    return "onednn" if IsMklEnabled() else "tensorflow"


def on_gpu() -> bool:
    """Whether operations made now are going to run on a GPU; those of a file are not."""
    if runtime() == EXPORTED:
        return False
    if backend.backend() == "torch":
        import torch

        return torch.cuda.is_available()
    return keras.distribution.list_devices()[0].startswith("gpu")


def differentiable() -> bool:
    """Whether a gradient may be taken of the operations made now; not in a file or a `no_grad`."""
    if runtime() == EXPORTED:
        return False
    if backend.backend() == "torch":
        import torch

        return torch.is_grad_enabled()
    return True


def holds_integers() -> bool:
    """Whether what the operations made now pass on is going to be int8, in a file."""
    return _INTEGERS.get()


@contextlib.contextmanager
def exporting(integers: bool = False) -> Iterator[None]:
    """A context in which bilinear layers make operations that suit an exported file.

    Put it around `model.export` to write small SavedModel and ONNX files. `export_litert` enters
    it by itself.

    Outside of the context, a layer may form its kernel at each call. A converter computes the
    kernel ahead, as it depends on weights alone, and stores it in full size. Within the context, a
    layer applies its factors one after the other wherever they have fewer numbers than the
    kernel. Each factor is then a constant on the right of a matrix product.

    Args:
        integers: whether the file computes with int8. `True` chooses the operations that are
            fastest for int8; the default, `False`, those that are fastest for floats.

    Yields:
        `None`.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), BilinearDense(64)])
    >>> with exporting():
    ...     y = model(np.ones((2, 64)))
    >>> y.shape == (2, 64)
    True
    """
    outer_runtime, outer_integers = _RUNTIME.set(EXPORTED), _INTEGERS.set(integers)
    try:
        yield
    finally:
        _RUNTIME.reset(outer_runtime)
        _INTEGERS.reset(outer_integers)
