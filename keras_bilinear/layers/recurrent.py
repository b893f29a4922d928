"""What the bilinear recurrent layers and their cells share."""

import inspect
from typing import Any, Self

import keras
import numpy as np
from keras import ops, tree

from keras_bilinear.keras_private import graph
from keras_bilinear.keras_private.gradients import gradients as gradients_of
from keras_bilinear.kronecker import cost
from keras_bilinear.kronecker.factorization import (
    Factorization,
    check_factors,
    check_positive_int,
    recurrent_input_factors,
)
from keras_bilinear.kronecker.target import EXPORTED, on_gpu, runtime
from keras_bilinear.layers.base import SHARED, BilinearLayer, convert
from keras_bilinear.layers.converter import (
    Converter,
    between_factors,
    check_built,
    check_width,
    converter_of,
    is_bilinear,
)
from keras_bilinear.layers.kernel import GateKernel, KroneckerKernel, split_blocks

RECURRENT = ("rank", "recurrent_rank", *SHARED[1:])


class RecurrentConverter(Converter):
    """Between the recurrent layers of Keras, or their cells, and the bilinear layers or cells."""

    kernel_names = ("kernel", "recurrent_kernel")
    constraint_names = ("kernel_constraint", "recurrent_constraint")
    width = "units"

    def holder(self, layer: keras.Layer) -> keras.Layer:
        return getattr(layer, "cell", layer)

    def count_blocks(self, full: keras.Layer) -> int:
        return getattr(self.bilinear_class, "cell_class", self.bilinear_class).gates

    def options(self, full: keras.Layer) -> dict[str, Any]:
        options = super().options(full)
        if isinstance(full, keras.layers.RNN):
            # Keras forgets the seed of its simple recurrent layer.
            options |= {"seed": full.cell.seed, "zero_output_for_mask": full.zero_output_for_mask}
        return options

    def input_shape(self, layer: keras.Layer) -> tuple:
        if not isinstance(layer, keras.layers.RNN):
            return super().input_shape(layer)
        batch_size = layer.states[0].shape[0] if layer.stateful else None
        return (batch_size, None, self.input_dim(layer))

    def copy_shared(self, source: keras.Layer, target: keras.Layer) -> None:
        super().copy_shared(source, target)
        states = (getattr(layer, "states", None) or () for layer in (source, target))
        for state, its_copy in zip(*states, strict=True):
            its_copy.assign(ops.convert_to_numpy(state))

    def rows(
        self,
        full: keras.Layer,
        inputs: np.ndarray,
        mask: Any = None,
        initial_state: Any = None,
        **call: Any,
    ) -> dict[str, list]:
        check_width(full, inputs, self.input_dim(full))
        if inputs.ndim != 3:
            raise ValueError(
                f"`calibration_data` must be inputs of the layer {full.name!r}, of 3 axes. "
                f"Received: an array of shape {inputs.shape}"
            )
        inputs, states = self.steps(full, inputs, mask, initial_state)
        return {
            "kernel": [inputs] * self.count_blocks(full),
            "recurrent_kernel": self.state_rows(full.cell, inputs, states),
        }

    def gradients(
        self,
        full: keras.Layer,
        inputs: np.ndarray,
        rows: dict[str, list],
        gradients: Any,
        mask: Any = None,
        initial_state: Any = None,
        **call: Any,
    ) -> dict[str, list]:
        gates, units = self.count_blocks(full), full.cell.units
        # What is added to the products of the input kernel comes in as further inputs.
        runner = self._runner(full)
        runner.build((None, None, inputs.shape[-1] + gates * units))
        kernel, *others = full.cell.get_weights()
        runner.cell.set_weights([np.concatenate([kernel, np.eye(gates * units)]), *others])
        inputs = ops.convert_to_tensor(inputs)

        def run(added):
            outputs = runner(
                ops.concatenate([inputs, *added], axis=-1), mask=mask, initial_state=initial_state
            )
            return tree.flatten(outputs)

        added = np.zeros((*inputs.shape[:2], gates * units), "float32")
        (found,) = gradients_of(run, [added], lambda _: tree.flatten(gradients))
        seen = self._seen(full, inputs, mask)
        if full.go_backwards:
            found = found[:, ::-1]
        found = np.split(found[seen], gates, axis=1)
        return {"kernel": found, "recurrent_kernel": self.state_gradients(full.cell, rows, found)}

    def state_gradients(self, cell: keras.Layer, rows: dict[str, list], gradients: list) -> list:
        """The gradients at what the recurrent kernel of each gate of a full cell makes.

        Args:
            cell: the full cell.
            rows: what the kernels of each gate multiply, as `rows` gives it.
            gradients: the gradients at what the input kernel of each gate makes.
        """
        return gradients

    def _runner(self, full: keras.Layer, **options: Any) -> keras.Layer:
        """A recurrent layer, not built, with the options of a full layer, and no states to keep."""
        config = {**full.get_config(), **options}
        return type(full).from_config({**config, "stateful": False, "unroll": False})

    def _seen(self, full: keras.Layer, inputs: Any, mask: Any) -> np.ndarray:
        """Which steps are not masked, `(sequences, timesteps)`, in the order of the calculation."""
        seen = np.ones(inputs.shape[:2], bool)
        if mask is not None:
            seen = ops.convert_to_numpy(mask).reshape(seen.shape).astype(bool)
        return seen[:, ::-1] if full.go_backwards else seen

    def steps(
        self, full: keras.Layer, inputs: np.ndarray, mask: Any = None, initial_state: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The inputs of all steps of a call that are not masked, and the states before them.

        Args:
            full: a built full layer.
            inputs: inputs of the call, `(sequences, timesteps, ...)`.
            mask: the mask of the call.
            initial_state: the first states of the call; `None` for zeros.

        Returns:
            Two arrays, of `(steps, ...)`.
        """
        runner = self._runner(full, return_sequences=True, return_state=False)
        runner.build(inputs.shape)
        runner.cell.set_weights(full.cell.get_weights())
        outputs = ops.convert_to_numpy(runner(inputs, mask=mask, initial_state=initial_state))
        seen = self._seen(full, inputs, mask)
        if full.go_backwards:
            inputs = inputs[:, ::-1]
        if initial_state is None:
            first = np.zeros_like(outputs[:, :1])
        else:
            first = ops.convert_to_numpy(tree.flatten(initial_state)[0])[:, None]
        # The state before a step is the output of the last step that was not masked.
        after = np.maximum.accumulate(np.where(seen, range(1, inputs.shape[1] + 1), 0), axis=1)
        before = np.pad(after, ((0, 0), (1, 0)))[:, :-1]
        before = before.reshape(*before.shape, *[1] * (outputs.ndim - 2))
        states = np.take_along_axis(np.concatenate([first, outputs], axis=1), before, axis=1)
        return inputs[seen], states[seen]

    def state_rows(self, cell: keras.Layer, inputs: np.ndarray, states: np.ndarray) -> list:
        """What the recurrent kernel of each gate of a full cell multiplies.

        Args:
            cell: the full cell.
            inputs: inputs of some steps, `(steps, features)`.
            states: states before these steps, `(steps, units)`.
        """
        return [states] * self.count_blocks(cell)

    def can_calibrate(self, full: keras.Layer) -> bool:
        # A cell alone sees one step, and does not know where its states come from.
        return isinstance(full, keras.layers.RNN) and super().can_calibrate(full)

    def workspace(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        if not is_bilinear(layer):
            return 0
        rows = self.applications(layer, inputs, outputs)
        steps = inputs[1] if isinstance(layer, keras.layers.RNN) else 1
        # Steps come one after the other, but the inputs of all may be projected before them.
        in_steps = self.holder(layer).projects_in_steps(inputs[0])
        kernel, recurrent_kernel = map(between_factors, layer.kernels.values())
        return (rows // steps if in_steps else rows) * kernel + rows // steps * recurrent_kernel


class BilinearCell(BilinearLayer):
    """Base of the bilinear cells: one step of a recurrent layer.

    The gates lie side by side in the kernel and in the recurrent kernel of the stock cell. In
    the bilinear cell each gate has factors of its own.

    A subclass also inherits from the stock cell, which checks and keeps its own arguments. It
    sets `gates`, the number of gates, and implements `make_step(mask)`. A loop repeats the
    function that `make_step` returns: `(x, states) -> (output, states)`, with `x` from
    `input_projection` and `mask` the dropout mask of the state.

    Args:
        *args: arguments of the stock cell.
        rank: positive integer, number of Kronecker terms of each gate's input kernel.
        recurrent_rank: positive integer, number of terms of each gate's recurrent kernel;
            `None` takes `rank`.
        input_factors: `(d1, d2)` with a product of at least the number of features; `None`
            chooses near-square factors.
        output_factors: `(u1, u2)` with a product of at least `units`; `None` chooses
            near-square factors. The recurrent kernel has them on both sides, reversed on
            the side of the inputs when one factor is 1 (low rank).
        implementation: `"factorized"` applies one factor after the other; `"materialized"`
            forms the kernels, once for each call; `"auto"` takes what was measured to be
            faster for batches and, on a GPU, forms the kernels and runs the stock layer's
            loop.
        **kwargs: arguments of the stock cell.
    """

    gates: int
    own_arguments = RECURRENT
    units_argument = "units"  # of the stock cell, sets the width of the output

    def __init__(
        self,
        *args,
        rank: int = 1,
        recurrent_rank: int | None = None,
        input_factors: tuple | None = None,
        output_factors: tuple | None = None,
        implementation: str = "auto",
        **kwargs,
    ):
        super().__init__(
            *args,
            rank=rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
            **kwargs,
        )
        name = self.units_argument
        self.units = check_positive_int(name, getattr(self, name))
        if recurrent_rank is not None:
            recurrent_rank = check_positive_int("recurrent_rank", recurrent_rank)
        check_factors("output_factors", output_factors, self.units)
        self.recurrent_rank = recurrent_rank
        self.bias = None

    def factorize(self, input_shape: tuple) -> dict[str, Factorization]:
        if input_shape[-1] is None:
            raise ValueError(
                f"The last dimension of the input of `{type(self).__name__}` must be known. "
                f"Received: input_shape={input_shape}"
            )
        return {
            "kernel": self.factorization_of(
                input_shape[-1], self.units, blocks=self.gates, share_right=False
            ),
            "recurrent_kernel": self.factorization_of(
                self.units,
                self.units,
                input_factors=recurrent_input_factors(self.units, self.output_factors),
                rank=self.recurrent_rank or self.rank,
                blocks=self.gates,
                share_right=False,
            ),
        }

    def build(self, input_shape: tuple):
        factorizations = self.factorize(input_shape)
        self._kernel = self.add_kernel(
            "kernel",
            factorizations["kernel"],
            self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
            **self._kernel_options("kernel"),
        )
        self._recurrent_kernel = self.add_kernel(
            "recurrent_kernel",
            factorizations["recurrent_kernel"],
            self.recurrent_initializer,
            regularizer=self.recurrent_regularizer,
            constraint=self.recurrent_constraint,
            **self._kernel_options("recurrent_kernel"),
        )
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=self._bias_shape(),
                initializer=self._bias_initializer(),
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        self.built = True

    def _kernel_options(self, name: str) -> dict[str, Any]:
        """The class of a kernel, and arguments that only this class has."""
        return {"kernel_class": GateKernel}

    def _bias_shape(self):
        return (self.gates * self.units,)

    def _bias_initializer(self):
        return self.bias_initializer

    @property
    def recurrent_factorization(self) -> Factorization:
        """The `Factorization` of the recurrent kernel."""
        check_built(self)
        return self.kernels["recurrent_kernel"].factorization

    @property
    def recurrent_kernel(self):
        """The recurrent kernel that the factors stand for, a new tensor of full size."""
        check_built(self)
        return self.kernels["recurrent_kernel"].materialize()

    def input_projection(self, mask):
        """The part of a step that knows no state, for any number of steps at once.

        Args:
            mask: dropout mask of `(batch, width)`, a list of them, one for each
                gate, or `None`.

        Returns:
            A function of inputs, `(..., batch, width)`, to a list, one for each
            gate, of `(..., batch, units)`.
        """
        project = self._projection(self._kernel, mask)
        if self.bias is None:
            return project
        biases = split_blocks(self._input_bias(), self.gates)
        return lambda inputs: [
            ops.add(block, bias) for block, bias in zip(project(inputs), biases, strict=True)
        ]

    def projects_in_steps(self, batch_size):
        """Whether a loop is faster with the inputs projected in each of its steps, not before."""
        kernel = self._kernel
        return cost.pays_in_steps(kernel.factorization, kernel.order, batch_size)

    def _input_bias(self):
        return ops.convert_to_tensor(self.bias)

    def _projection(self, kernel, mask, gates=None):
        if isinstance(mask, list):
            gates = gates or range(self.gates)
            projections = [kernel.projection((gate,)) for gate in gates]
            return lambda x: [
                block
                for gate, project in zip(gates, projections, strict=True)
                for block in project(ops.multiply(x, mask[gate]))
            ]
        project = kernel.projection(gates)
        return project if mask is None else lambda x: project(ops.multiply(x, mask))

    def dropout_masks(self, inputs, state, training):
        """The dropout masks of the input and of the state of one step; `None` drops nothing."""
        if not training:
            return None, None
        return (
            self.get_dropout_mask(inputs) if 0 < self.dropout < 1 else None,
            self.get_recurrent_dropout_mask(state) if 0 < self.recurrent_dropout < 1 else None,
        )

    def call(self, inputs, states, training: bool = False):
        nested = tree.is_nested(states)
        states = list(states) if nested else [states]
        mask, recurrent_mask = self.dropout_masks(inputs, states[0], training)
        x = self.input_projection(mask)(inputs)
        output, states = self.make_step(recurrent_mask)(x, states)
        return output, (states if nested else states[0])

    @classmethod
    def from_full(
        cls,
        layer: keras.layers.Layer,
        rank: int = 1,
        recurrent_rank: int | None = None,
        input_factors: tuple | None = None,
        output_factors: tuple | None = None,
        implementation: str = "auto",
    ) -> Self:
        """Makes a bilinear cell from a built full cell.

        The factors of each gate are the Kronecker sum nearest to its full kernel. To fit them
        to data, convert the layer that runs the cell: a cell alone sees one step.

        Args:
            layer: a built cell of exactly the stock class. It stays as it is.
            rank: number of Kronecker terms of each gate's input kernel.
            recurrent_rank: number of terms of each gate's recurrent kernel; `None` takes
                `rank`.
            input_factors: `(d1, d2)`; `None` chooses them.
            output_factors: `(u1, u2)`; `None` chooses them.
            implementation: `"auto"`, `"factorized"` or `"materialized"`.

        Returns:
            A built cell with the same name and options.

        Raises:
            TypeError: if `layer` is not of the stock class.
            ValueError: if `layer` is not built or holds NaN or infinite weights, or if
                another argument is not valid.
        """
        return convert(
            cls,
            layer,
            None,
            rank=rank,
            recurrent_rank=recurrent_rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
        )


class BilinearRNN(keras.layers.RNN):
    """Base of the bilinear recurrent layers.

    Subclasses also inherit from the stock layer, `full_class`, and say
    `cell_class`. The stock layer's own loop, where it has one for this backend
    and device (cuDNN), runs on the materialized kernels; everywhere else the
    loop is this one. The inputs of all time steps are projected at once before it
    or, where that is faster, those of each step in it.
    """

    full_class: type[keras.layers.RNN]
    cell_class: type[BilinearCell]
    own_arguments = RECURRENT

    def __init__(
        self,
        *args,
        rank: int = 1,
        recurrent_rank: int | None = None,
        input_factors: tuple | None = None,
        output_factors: tuple | None = None,
        implementation: str = "auto",
        **kwargs,
    ):
        own = {
            "rank": rank,
            "recurrent_rank": recurrent_rank,
            "input_factors": input_factors,
            "output_factors": output_factors,
            "implementation": implementation,
        }
        self._set_up(args, kwargs, own)

    def _set_up(self, args, kwargs, own):
        """Makes the cell, and calls the constructor of `keras.layers.RNN`.

        Args:
            args: arguments of the stock layer.
            kwargs: arguments of the stock layer, by name.
            own: the arguments that the stock layer does not have.
        """
        # The stock layer checks and completes what it knows.
        full = self.full_class(*args, **{**kwargs, "name": "full"})
        of_cell = inspect.signature(type(full.cell).__init__).parameters
        options = {name: getattr(full.cell, name) for name in of_cell if hasattr(full.cell, name)}
        # The stock cell of a convolution calls the number of its dimensions `rank`.
        cell = self.cell_class(
            **{**options, **own}, dtype=full.dtype_policy, trainable=full.trainable
        )
        of_full = inspect.signature(self.full_class.__init__).parameters
        of_rnn = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll")
        keras.layers.RNN.__init__(
            self,
            cell,
            **{name: getattr(full, name) for name in of_rnn},
            activity_regularizer=full.activity_regularizer,
            **{k: value for k, value in kwargs.items() if k not in (*of_full, *of_rnn)},
        )
        self.input_spec = full.input_spec
        self.supports_jit = full.supports_jit
        if hasattr(full, "use_cudnn"):
            self.use_cudnn = full.use_cudnn

    def _runs_on_gpu(self):
        """Whether the stock layer's loop is to be tried first."""
        if self.use_cudnn != "auto":
            return self.use_cudnn and runtime() != EXPORTED
        # JAX gives an LSTM to cuDNN in float32 only; Keras tries all the same, and fails.
        fails = (
            keras.config.backend() == "jax"
            and isinstance(self, keras.layers.LSTM)
            and self.compute_dtype != "float32"
        )
        return self.cell.implementation != "factorized" and on_gpu() and not fails

    def inner_loop(self, sequences, initial_state, mask, training=False):
        mask = mask[0] if tree.is_nested(mask) else mask
        # The stock GRU takes it out of its list before it tries its loop.
        initial_state = initial_state if tree.is_nested(initial_state) else [initial_state]
        if self.stateful:
            # PyTorch would not find the old state when it differentiates.
            initial_state = [ops.copy(state) for state in initial_state]
        dropped, recurrent_dropped = self.cell.dropout_masks(
            sequences[:, 0], initial_state[0], training
        )
        x = _swap(sequences)
        project = self.cell.input_projection(dropped)
        step = self.cell.make_step(recurrent_dropped)
        size, steps = sequences.shape[:2]
        if keras.config.backend() == "torch":
            steps = int(steps)  # where it is traced, a tensor, which Keras takes for lengths
        # While a model is exported, a free size may be a symbol.
        if self.cell.projects_in_steps(size if isinstance(size, int) else None):
            step = _after(project, step)
        else:
            x = project(x)
        last, outputs, states = graph.rnn(
            step,
            x,
            initial_state,
            go_backwards=self.go_backwards,
            mask=mask if mask is None else _swap(mask),
            unroll=self.unroll,
            # In a list, as Keras takes a tensor for lengths to mask by.
            input_length=steps or [ops.shape(sequences)[1]],
            time_major=True,
            zero_output_for_mask=self.zero_output_for_mask,
            return_all_outputs=self.return_sequences,
        )
        return last, _swap(outputs), states

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            # Keras forgets that of its simple recurrent layer.
            "seed": self.cell.seed,
            **{name: getattr(self.cell, name) for name in self.own_arguments},
        }

    def factorize(self, input_shape: tuple) -> dict[str, Factorization]:
        """The shapes of the kernels of the cell, for inputs of some shape."""
        return self.cell.factorize((input_shape[0], *input_shape[2:]))

    @property
    def kernels(self) -> dict[str, KroneckerKernel]:
        """The kernels of the cell by their names in the full one; none before it is built."""
        return self.cell.kernels

    @classmethod
    def from_full(
        cls,
        layer: keras.layers.Layer,
        rank: int = 1,
        recurrent_rank: int | None = None,
        input_factors: tuple | None = None,
        output_factors: tuple | None = None,
        implementation: str = "auto",
        calibration_data=None,
    ) -> Self:
        """Makes a bilinear layer from a built full layer.

        The factors of each gate are the Kronecker sum nearest to its full kernel. With
        calibration data, the factors and the bias are fitted such that the products with
        both kernels differ least on them; the recurrent kernels on the states that the full
        layer reaches.

        Args:
            layer: a built layer of exactly the stock class. It stays as it is.
            rank: number of Kronecker terms of each gate's input kernel.
            recurrent_rank: number of terms of each gate's recurrent kernel; `None` takes
                `rank`.
            input_factors: `(d1, d2)`; `None` chooses them.
            output_factors: `(u1, u2)`; `None` chooses them.
            implementation: `"auto"`, `"factorized"` or `"materialized"`.
            calibration_data: inputs of the layer: an array of shape
                `(sequences, timesteps, features)`, or an iterable of such arrays, each of
                which is read once. `None` takes the nearest sums.

        Returns:
            A built layer with the same name and options.

        Raises:
            TypeError: if `layer` is not of the stock class, or `calibration_data` is neither
                an array nor iterable.
            ValueError: if `layer` is not built or holds NaN or infinite weights; if there
                are no calibration data, or they are not finite or no inputs of the layer; or
                if another argument is not valid.
        """
        return convert(
            cls,
            layer,
            calibration_data,
            rank=rank,
            recurrent_rank=recurrent_rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
        )

    def expand(self) -> keras.layers.Layer:
        """Makes the stock Keras layer that computes the same.

        Raises:
            AttributeError: if the layer is not built.
        """
        return converter_of(self).expand(self)


def _after(project, step):
    """A step that projects its inputs."""
    return lambda x, states: step(project(x), states)


def _swap(x):
    """Swaps batch and time."""
    return ops.swapaxes(x, 0, 1)
