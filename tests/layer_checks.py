"""The one harness that every layer passes, on every backend.

Describe a layer by a `LayerSpec` and list it in `test_layers.py`.
"""

import copy
import dataclasses
import inspect
import json
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
from backend_gradient import layer_gradients
from keras import ops

BACKEND = keras.backend.backend()
JIT_COMPILE = [
    False,
    pytest.param(
        True,
        marks=pytest.mark.skipif(
            BACKEND == "torch", reason="torch.compile needs a C++ compiler and minutes"
        ),
    ),
]
OF_EVERY_LAYER = {"name", "trainable", "dtype", "activity_regularizer"}
# What a model's outputs may differ by when computed in a policy's dtype.
POLICIES = {
    "float32": 1e-5,
    "float16": 1e-2,
    "bfloat16": 6e-2,
    "mixed_float16": 1e-2,
    "mixed_bfloat16": 6e-2,
}
LOAD_SCRIPT = """
import pathlib
import sys

import keras
import numpy as np

import keras_bilinear

for path in pathlib.Path(sys.argv[1]).glob("*.keras"):
    data = np.load(path.with_suffix(".npz"))
    model = keras.models.load_model(path)
    outputs = keras.ops.convert_to_numpy(model(data["x"], training=False)).astype("float32")
    np.testing.assert_allclose(outputs, data["y"], rtol=1e-6, atol=1e-6, err_msg=path.name)
    print("loaded", path.name)
"""


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """A layer and how to call it.

    Attributes:
        layer_class: the class under test.
        arguments: the least that its constructor takes.
        every_argument: a value for every argument of its constructor, none the default.
        inputs: arrays of every rank to call it on, each with a batch of 2 or more.
        not_in_config: arguments that it hands on to its weights and forgets.
        at_default: those of `every_argument` that can be no other with the rest.
    """

    layer_class: type
    arguments: dict
    every_argument: dict
    inputs: tuple
    not_in_config: tuple = ()
    at_default: tuple = ()

    def make(self, **arguments):
        return self.layer_class(**{**self.arguments, **arguments})

    def make_with_every_argument(self, **arguments):
        return self.layer_class(**{**self.every_argument, **arguments})

    def make_model(self, x=None, layer=None):
        """A functional model of the layer, all dimensions but the last of a float unknown."""
        x = self.inputs[-1] if x is None else x
        known = x.shape[-1:] if np.issubdtype(x.dtype, np.floating) else ()
        shape = (None,) * (x.ndim - 1 - len(known)) + known
        inputs = keras.Input(shape, dtype=x.dtype.name)
        return keras.Model(inputs, (layer or self.make())(inputs))


def to_numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def predict(model, x):
    """What a compiled model answers; each new model is traced."""
    return model.predict(x, verbose=0)


def call(model, x):
    """What a model answers, without being traced for it."""
    return ops.convert_to_numpy(model(x, training=False))


def outcome(function):
    """What a call does, good or bad, in a form that compares."""
    try:
        return "returns", function()
    except Exception as error:
        return "raises", type(error)


def assert_same_weights(first, second):
    assert len(first.weights) == len(second.weights)
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


class LayerChecks:
    """Inherit, and define the fixtures `spec` (one layer) and `specs` (all of them by name)."""

    def test_spec_sets_every_argument_to_another_value_than_its_default(self, spec):
        parameters = inspect.signature(spec.layer_class.__init__).parameters
        named = {n: p for n, p in parameters.items() if n not in ("self", "kwargs")}
        assert {*named, *OF_EVERY_LAYER} == {*spec.every_argument}
        for name, parameter in named.items():
            changed = np.any(spec.every_argument[name] != parameter.default)
            assert changed == (name not in spec.at_default), name

    def test_config_round_trip(self, spec):
        layer = spec.make_with_every_argument()
        config = layer.get_config()
        assert {*spec.every_argument} - {*config} == {*spec.not_in_config}
        config = json.loads(json.dumps(config))
        again = spec.layer_class.from_config(copy.deepcopy(config))
        assert json.loads(json.dumps(again.get_config())) == config

    def test_config_holds_what_the_user_passed(self, spec):
        config = spec.make_with_every_argument().get_config()
        for name, value in spec.every_argument.items():
            if name in (*spec.at_default, "dtype"):
                continue
            if isinstance(value, (bool, int, str)):
                read = config[name]
                assert value in (read, read.get("class_name") if isinstance(read, dict) else None)
            elif isinstance(value, tuple):
                assert tuple(config[name]) == value
            elif hasattr(value, "get_config"):
                assert config[name]["config"] == value.get_config()

    def test_default_config_keeps_what_the_layer_chose_out(self, spec):
        layer = spec.make()
        config = layer.get_config()
        layer(spec.inputs[0])
        assert layer.get_config() == config

    def test_serialize_needs_no_custom_objects(self, spec):
        layer = spec.make_with_every_argument()
        config = keras.saving.serialize_keras_object(layer)
        again = keras.saving.deserialize_keras_object(json.loads(json.dumps(config)))
        assert type(again) is spec.layer_class

    def test_model_file_loads_in_a_fresh_process(self, specs, tmp_path):
        for name, spec in specs.items():
            for kind, layer in (
                ("plain", spec.make()),
                ("full", spec.make_with_every_argument()),
            ):
                x = spec.inputs[-1]
                model = spec.make_model(x, layer)
                path = tmp_path / f"{name}_{kind}.keras"
                model.save(path)
                np.savez(path.with_suffix(".npz"), x=x, y=call(model, x).astype("float32"))
        result = subprocess.run(
            [sys.executable, "-c", LOAD_SCRIPT, tmp_path],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("loaded") == 2 * len(specs)

    def test_weights_round_trip(self, spec, tmp_path):
        x = spec.inputs[-1]
        model, other, third = (spec.make_model() for _ in range(3))
        assert not np.allclose(call(model, x), call(other, x))
        other.set_weights(model.get_weights())
        assert_same_weights(other, model)
        np.testing.assert_array_equal(call(other, x), call(model, x))
        model.save_weights(tmp_path / "model.weights.h5")
        third.load_weights(tmp_path / "model.weights.h5")
        assert_same_weights(third, model)

    def test_weights_are_the_two_factors_first(self, spec):
        layer = spec.make()
        layer(spec.inputs[0])
        assert [v.name for v in layer.weights[:2]] == ["left_kernel", "right_kernel"]
        assert layer.weights[0] is layer.left_kernel
        assert layer.weights[1] is layer.right_kernel
        assert layer.non_trainable_weights == []

    def test_symbolic_call_agrees_with_eager(self, spec):
        for x in spec.inputs:
            layer = spec.make()
            model = spec.make_model(x, layer)
            eager = layer(x)
            symbol = keras.KerasTensor((None, *x.shape[1:]), dtype=x.dtype.name)
            spec_of_outputs = layer.compute_output_spec(symbol)
            assert spec_of_outputs.shape == (None, *eager.shape[1:])
            assert spec_of_outputs.dtype == keras.backend.standardize_dtype(eager.dtype)
            assert tuple(layer.compute_output_shape(x.shape)) == tuple(eager.shape)
            assert model.output.shape[-1] == eager.shape[-1]
            assert model.output.shape[0] is None
            np.testing.assert_allclose(predict(model, x), to_numpy(eager), rtol=1e-5, atol=1e-5)

    def test_unknown_dimensions_may_change(self, spec):
        x = spec.inputs[-1]
        layer = spec.make()
        model, full = (spec.make_model(x, one) for one in (layer, built(layer, x).expand()))
        axes = x.ndim - np.issubdtype(x.dtype, np.floating)
        for axis in range(axes):
            longer = np.concatenate([x, x], axis=axis)
            expected = predict(full, longer)
            np.testing.assert_allclose(predict(model, longer), expected, rtol=1e-4, atol=1e-5)

    def test_symbolic_call_builds(self, spec):
        layer = spec.make()
        assert not layer.built
        spec.make_model(layer=layer)
        assert layer.built
        assert layer.count_params() == layer.factorization.parameters + sum(
            np.prod(v.shape) for v in layer.weights[2:]
        )

    def test_same_outputs_as_the_full_layer(self, spec):
        layer = spec.make()
        for x in spec.inputs:
            outputs = layer(x)
            expected = layer.expand()(x)
            assert tuple(outputs.shape) == tuple(expected.shape)
            np.testing.assert_allclose(to_numpy(outputs), to_numpy(expected), rtol=1e-4, atol=1e-5)

    def test_same_mask_as_the_full_layer(self, spec):
        for layer in (spec.make(), spec.make_with_every_argument()):
            x = spec.inputs[1]
            layer(x)
            full = layer.expand()
            assert layer.supports_masking == full.supports_masking
            for mask in (None, ops.convert_to_tensor(np.arange(x.shape[1]) < np.ones((len(x), 1)))):
                if type(full) is keras.layers.ReversibleEmbedding:  # it may mask in its call
                    full = keras.layers.Embedding(full.input_dim, 1, mask_zero=full.mask_zero)
                actual, expected = (
                    one.compute_mask(ops.convert_to_tensor(x), mask) for one in (layer, full)
                )
                assert (actual is None) == (expected is None)
                if expected is not None:
                    np.testing.assert_array_equal(to_numpy(actual), to_numpy(expected))

    def test_empty_inputs_as_the_full_layer_takes_them(self, spec):
        """Of empty batches that the full layer refuses nothing is asked.

        Keras 3.13 refuses them in convolutions, and TensorFlow, with oneDNN on processors
        with AVX-512, gives them a wrong shape.
        """
        layer = spec.make()
        for x in spec.inputs:
            full = built(layer, x).expand()
            for empty in (x[:0], x[:, :0]) if x.ndim > 2 else (x[:0],):
                actual, expected = (
                    outcome(lambda one=one, empty=empty: tuple(one(empty).shape))
                    for one in (layer, full)
                )
                if expected[0] == "returns" or len(empty):
                    assert actual == expected

    @pytest.mark.parametrize("policy", POLICIES)
    def test_dtype_policy(self, spec, policy):
        x = spec.inputs[1]
        reference = spec.make()
        expected = to_numpy(reference(x))
        layer = spec.make(dtype=policy)
        layer(x)
        layer.set_weights(reference.get_weights())
        outputs = layer(x)
        policy_object = keras.dtype_policies.get(policy)
        assert {v.dtype for v in layer.weights} == {policy_object.variable_dtype}
        assert keras.backend.standardize_dtype(outputs.dtype) == policy_object.compute_dtype
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            to_numpy(outputs), expected, rtol=0, atol=POLICIES[policy] * scale
        )
        symbol = keras.KerasTensor(x.shape, dtype=x.dtype.name)
        assert layer.compute_output_spec(symbol).dtype == policy_object.compute_dtype
        assert predict(spec.make_model(x, layer), x).dtype == policy_object.compute_dtype

    @pytest.mark.parametrize("jit_compile", JIT_COMPILE)
    def test_a_fit_step_moves_every_variable(self, spec, jit_compile):
        x = spec.inputs[1]
        model = spec.make_model(x)
        before = model.get_weights()
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        loss = model.fit(x, np.ones_like(call(model, x)), epochs=2, verbose=0).history["loss"]
        assert loss[1] < loss[0]
        for variable, old, new in zip(
            model.trainable_variables, before, model.get_weights(), strict=True
        ):
            assert np.isfinite(new).all()
            assert np.any(old != new), variable.name

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
    def test_fit_in_mixed_precision(self, spec, policy):
        x = spec.inputs[1]
        model = spec.make_model(x, spec.make(dtype=policy))
        model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
        loss = model.fit(x, np.ones_like(call(model, x)), epochs=5, verbose=0).history["loss"]
        assert loss[-1] < loss[0]

    def test_frozen_layer_stays(self, spec):
        x = spec.inputs[1]
        model = spec.make_model(x, spec.make(trainable=False))
        before = model.get_weights()
        assert model.trainable_variables == []
        model.compile("sgd", "mse", jit_compile=False)
        model.evaluate(x, call(model, x), verbose=0)
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)

    def test_clone_model(self, spec):
        x = spec.inputs[-1]
        model = spec.make_model(layer=spec.make_with_every_argument())
        clone = keras.models.clone_model(model)
        assert clone.layers[-1] is not model.layers[-1]
        assert clone.layers[-1].get_config() == model.layers[-1].get_config()
        clone.set_weights(model.get_weights())
        np.testing.assert_array_equal(call(clone, x), call(model, x))

    @pytest.mark.parametrize("copier", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
    def test_copies_as_the_full_layer_does(self, spec, copier):
        layer = spec.make()
        model = spec.make_model(layer=layer)
        x = spec.inputs[-1]

        def copied_outputs(model):
            copied = copier(model)
            return bool(np.all(call(copied, x) == call(model, x)))

        full = spec.make_model(layer=layer.expand())
        assert outcome(lambda: copied_outputs(model)) == outcome(lambda: copied_outputs(full))
        assert outcome(lambda: len(copier(layer).weights) - 2) == outcome(
            lambda: len(copier(layer.expand()).weights) - 1
        )

    def test_training_flag_changes_no_output(self, spec):
        layer = spec.make()
        for x in spec.inputs:
            outputs = [to_numpy(layer(x, training=training)) for training in (None, True, False)]
            np.testing.assert_array_equal(outputs[0], outputs[1])
            np.testing.assert_array_equal(outputs[0], outputs[2])

    def test_training_flag_changes_no_gradient(self, spec):
        layer, x = spec.make(rank=4), spec.inputs[-1]
        weights = np.ones(layer(x).shape)
        expected, *others = (
            layer_gradients(layer, x, weights, **arguments)
            for arguments in ({}, {"training": True}, {"training": False})
        )
        for gradients in others:
            for gradient, value in zip(gradients, expected, strict=True):
                np.testing.assert_allclose(gradient, value, rtol=1e-5, atol=1e-6)

    def test_same_seed_same_values(self, spec):
        values = []
        for seed in (1, 1, 2):
            keras.utils.set_random_seed(seed)
            values.append(to_numpy(spec.make()(spec.inputs[0])))
        np.testing.assert_array_equal(values[0], values[1])
        assert not np.allclose(values[0], values[2])

    def test_expand_and_back(self, spec):
        layer = spec.make_with_every_argument(dtype="float32")
        layer(spec.inputs[1])
        plan = layer.factorization
        full = layer.expand()
        assert type(full) is layer.full_class
        own = {name: getattr(layer, name) for name in layer.own_arguments}
        own.update(input_factors=plan.input_factors, output_factors=plan.output_factors)
        again = spec.layer_class.from_full(full, **own)
        assert again.get_config() == {
            **layer.get_config(),
            "input_factors": plan.input_factors,
            "output_factors": plan.output_factors,
        }
        for x in spec.inputs:
            np.testing.assert_allclose(to_numpy(again(x)), to_numpy(layer(x)), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("implementation", ["factorized", "materialized", "auto"])
    def test_implementations_agree(self, spec, implementation):
        layer = spec.make()
        other = spec.make(implementation=implementation)
        for x in spec.inputs:
            expected = to_numpy(layer(x))
            other(x)
            other.set_weights(layer.get_weights())
            np.testing.assert_allclose(to_numpy(other(x)), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("rank", [0, -1, 1.0, True, "2", None])
    def test_refuses_rank(self, spec, rank):
        with pytest.raises(ValueError, match=r"`rank` must be a positive integer. Received: rank="):
            spec.make(rank=rank)

    @pytest.mark.parametrize("implementation", ["fast", None, 1, ["auto"]])
    def test_refuses_implementation(self, spec, implementation):
        with pytest.raises(ValueError, match=r"`implementation` must be one of .* Received: impl"):
            spec.make(implementation=implementation)

    @pytest.mark.parametrize("argument", ["input_factors", "output_factors"])
    @pytest.mark.parametrize("value", [3, (3,), (1, 2, 3), "12", (0, 5), (2.0, 3), (True, 3)])
    def test_refuses_factors(self, spec, argument, value):
        with pytest.raises(ValueError, match=rf"`{argument}.* must be a p.* Received: {argument}"):
            spec.make(**{argument: value})

    def test_kernel_of_an_unbuilt_layer(self, spec):
        for attribute in ("kernel", "factorization", "left_kernel", "right_kernel", "expand"):
            # PyTorch's own modules replace the text when a property raises.
            with pytest.raises(AttributeError, match=r"You must build the layer|has no attribute"):
                use(getattr(spec.make(), attribute))

    def test_from_full_refuses(self, spec):
        full_class = spec.layer_class.full_class
        full = spec.make_model(layer=spec.make()).layers[-1].expand()
        name = spec.layer_class.__name__
        takes = rf"`{name}\.from_full` takes"
        with pytest.raises(TypeError, match=rf"{takes} a `keras.layers.{full_class.__name__}`"):
            spec.layer_class.from_full(keras.layers.Flatten())
        subclass = type("Child", (full_class,), {})
        with pytest.raises(TypeError, match=r"Received: layer=.* \(of type Child\)"):
            spec.layer_class.from_full(subclass.from_config(full.get_config()))
        with pytest.raises(ValueError, match=f"{takes} a built layer.*Received: layer="):
            spec.layer_class.from_full(full_class.from_config(full.get_config()))
        for bad in (np.nan, np.inf, -np.inf):
            broken = full_class.from_config(full.get_config())
            broken.build(spec.inputs[0].shape)
            weights = full.get_weights()
            weights[-1] = np.full_like(weights[-1], bad)
            broken.set_weights(weights)
            with pytest.raises(ValueError, match=f"{takes} finite weights.*Received: layer="):
                spec.layer_class.from_full(broken)

    def test_from_full_refuses_a_quantized_layer(self, spec):
        full = spec.make_model(layer=spec.make()).layers[-1].expand()
        try:
            full.quantize("int8")
        except NotImplementedError:
            pytest.skip(f"Keras cannot quantize {type(full).__name__}")
        name = spec.layer_class.__name__
        with pytest.raises(ValueError, match=f"`{name}.from_full` takes .* not quantized.*int8"):
            spec.layer_class.from_full(full)


def built(layer, x):
    layer(x)
    return layer


def use(attribute):
    return attribute() if callable(attribute) else attribute
