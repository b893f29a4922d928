import itertools

import keras
import pytest

from keras_bilinear import exporting
from keras_bilinear.kronecker import cost
from keras_bilinear.kronecker.factorization import FACTORIZED, Factorization, Order
from keras_bilinear.kronecker.target import convolution_library

pytestmark = pytest.mark.usefixtures("cpu_costs")

LEFT_FIRST, RIGHT_FIRST, MATERIALIZED = Order

WINDOWS = {
    "channel": {"left_window": (1, 1), "right_window": (3, 3)},
    "spatial": {"left_window": (3, 1), "right_window": (1, 3)},
}


def convolution(channels, filters, rank=1, pattern="channel", groups=1):
    return Factorization.create(
        input_dim=channels, output_dim=filters, rank=rank, blocks=groups, **WINDOWS[pattern]
    )


@pytest.mark.parametrize("library", cost.NANOSECONDS)
def test_auto_takes_the_faster_implementation(library, monkeypatch):
    monkeypatch.setattr(cost, "convolution_library", lambda: library)
    for pattern in WINDOWS:
        assert cost.choose_order(convolution(512, 512, 1, pattern), "auto", (1, 1)) in FACTORIZED
        assert cost.choose_order(convolution(64, 64, 60, pattern), "auto", (1, 1)) is MATERIALIZED


def test_tensorflow_may_leave_convolutions_to_onednn(monkeypatch):
    if keras.config.backend() != "tensorflow":
        assert convolution_library() == keras.config.backend()
        return
    port = pytest.importorskip("tensorflow.python.util._pywrap_util_port")
    for enabled, library in ((True, "onednn"), (False, "tensorflow")):
        monkeypatch.setattr(port, "IsMklEnabled", lambda enabled=enabled: enabled)
        assert convolution_library() == library
    monkeypatch.delattr(port, "IsMklEnabled")
    assert convolution_library() == "tensorflow"


@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (2, 2)])
def test_choices_are_those_of_the_predicted_times(strides):
    ranks, widths = (1, 4, 8), ((32, 32), (64, 128), (256, 64))
    for rank, dims, pattern in itertools.product(ranks, widths, WINDOWS):
        each = convolution(*dims, rank, pattern)
        times = {way: cost.seconds(each, way, strides) for way in Order}
        chosen = cost.choose_order(each, "auto", strides)
        assert times[chosen] == min(times.values())
        factorized = cost.choose_order(each, "factorized", strides)
        assert times[factorized] == min(times[way] for way in FACTORIZED)
        assert cost.choose_order(each, "materialized", strides) is MATERIALIZED


def test_a_dense_projection_goes_by_its_macs():
    dense = Factorization.create(
        input_dim=64, output_dim=8, input_factors=(32, 2), output_factors=(2, 4)
    )
    assert cost.choose_order(dense, "auto") == LEFT_FIRST
    assert (
        cost.choose_order(Factorization.create(input_dim=64, output_dim=64, rank=50), "auto")
        is MATERIALIZED
    )


@pytest.mark.parametrize("backend", cost.GPU_LEAST_MACS)
def test_on_a_gpu_only_large_kernels_are_factorized(backend, monkeypatch):
    monkeypatch.setattr(cost, "runtime", lambda: backend)
    monkeypatch.setattr(cost, "on_gpu", lambda: True)
    large = Factorization.create(input_dim=4096, output_dim=4096)
    assert cost.choose_order(large, "auto") == large.order
    assert (
        cost.choose_order(Factorization.create(input_dim=4096, output_dim=4096, rank=30), "auto")
        is MATERIALIZED
    )
    assert (
        cost.choose_order(Factorization.create(input_dim=512, output_dim=512), "auto")
        is MATERIALIZED
    )
    assert cost.choose_order(convolution(64, 64), "auto", (1, 1)) is MATERIALIZED
    assert cost.choose_order(convolution(2048, 2048), "auto", (1, 1)) in FACTORIZED
    gates = Factorization.create(input_dim=1024, output_dim=1024, blocks=4, share_right=False)
    assert cost.choose_order(gates, "auto") is MATERIALIZED
    assert cost.choose_order(gates, "factorized") == gates.order


def test_small_products_of_gates_count_more_than_those_of_low_rank():
    def gates(**options):
        return Factorization.create(
            input_dim=1024, output_dim=1024, blocks=3, share_right=False, **options
        )

    low_rank = gates(rank=256, input_factors=(1024, 1), output_factors=(1, 1024))
    square = gates(rank=8)
    for one in (low_rank, square):
        assert one.macs < one.full_macs < cost.SMALL_PRODUCT * one.macs
    assert cost.choose_order(low_rank, "auto") == low_rank.order
    assert cost.choose_order(square, "auto") is MATERIALIZED
    assert cost.choose_order(gates(rank=1), "auto") == square.order


def test_files_hold_what_is_smaller():
    with exporting():
        for implementation in ("auto", "factorized", "materialized"):
            assert cost.choose_order(convolution(64, 64, 4), implementation, (1, 1)) == RIGHT_FIRST
            assert (
                cost.choose_order(convolution(64, 64, 60), implementation, (1, 1)) is MATERIALIZED
            )
        few_out = Factorization.create(
            input_dim=64,
            output_dim=8,
            input_factors=(8, 8),
            output_factors=(2, 4),
            **WINDOWS["channel"],
        )
        assert cost.choose_order(few_out, "auto", (1, 1)) == LEFT_FIRST


def test_gates_are_factorized_where_that_saves_much():
    for rank, order in ((1, LEFT_FIRST), (8, MATERIALIZED)):
        gates = Factorization.create(
            input_dim=1024, output_dim=1024, rank=rank, blocks=4, share_right=False
        )
        assert cost.choose_order(gates, "auto") == order
        assert cost.choose_order(gates, "factorized") == LEFT_FIRST


@pytest.mark.parametrize("backend", cost.STEP_LEAST_SAVED)
def test_gates_of_narrow_layers_are_materialized(monkeypatch, backend):
    monkeypatch.setattr(cost, "runtime", lambda: backend)
    monkeypatch.setattr(cost, "on_gpu", lambda: False)
    for units, order in (
        (64, MATERIALIZED),
        (128, MATERIALIZED if backend == "torch" else LEFT_FIRST),
        (512, LEFT_FIRST),
    ):
        gates = Factorization.create(input_dim=units, output_dim=units, blocks=4, share_right=False)
        assert cost.choose_order(gates, "auto") == order
        assert cost.choose_order(gates, "factorized") == LEFT_FIRST


def test_large_steps_of_a_loop_project_their_inputs(monkeypatch):
    factorization = Factorization.create(
        input_dim=128, output_dim=256, rank=4, blocks=4, share_right=False
    )
    for backend, pays in (("tensorflow", True), ("jax", True), ("torch", False)):
        monkeypatch.setattr(cost, "runtime", lambda backend=backend: backend)
        assert cost.pays_in_steps(factorization, MATERIALIZED, 64) is pays
        assert cost.pays_in_steps(factorization, MATERIALIZED, None) is pays
        assert not cost.pays_in_steps(factorization, LEFT_FIRST, 64)
        assert not cost.pays_in_steps(factorization, MATERIALIZED, 1)
    large = Factorization.create(
        input_dim=512, output_dim=1024, rank=4, blocks=4, share_right=False
    )
    assert cost.pays_in_steps(large, LEFT_FIRST, 64)
    monkeypatch.setattr(cost, "on_gpu", lambda: True)
    assert not cost.pays_in_steps(large, LEFT_FIRST, 64)


def test_files_project_the_inputs_of_a_loop_before_it():
    with exporting():
        large = Factorization.create(
            input_dim=512, output_dim=1024, rank=4, blocks=4, share_right=False
        )
        assert not cost.pays_in_steps(large, LEFT_FIRST, 64)


def test_work_of_groups_is_that_of_one_for_each():
    for order in Order:
        one = cost.work(convolution(12, 18), order, (2, 2))
        three = cost.work(convolution(12, 18, groups=3), order, (2, 2))
        assert three.chained == one.chained
        for name in ("macs", "patches", "outputs", "multiplied", "moved"):
            assert getattr(three, name) == 3 * getattr(one, name)


@pytest.mark.parametrize("pattern", WINDOWS)
def test_without_strides_macs_are_those_of_the_factorization(pattern):
    each = convolution(24, 40, 3, pattern)
    counts = [cost.count_macs(each, order, (1, 1)) for order in FACTORIZED]
    assert min(counts) == each.macs
    assert cost.count_macs(each, MATERIALIZED, (1, 1)) == each.full_macs == 9 * 24 * 40
