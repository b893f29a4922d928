"""Measures the sizes of full and bilinear layers, in parameters and as LiteRT files.

    python benchmarks/size.py

Writes `benchmarks/results/size.md`.
"""

import pathlib
import tempfile

import keras
import tables
from absl import app

import keras_bilinear
from keras_bilinear import BilinearDense
from keras_bilinear.litert.export import export_litert


def sizes(layer, width):
    """Parameters of a layer, and bytes of a LiteRT file with the layer alone."""
    model = keras.Sequential([keras.Input((width,)), layer])
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "layer.tflite")
        export_litert(model, path)
        return layer.count_params(), path.stat().st_size


def main(argv):
    del argv
    lines = [
        "# Sizes of dense layers",
        "",
        f"`python benchmarks/size.py`; keras_bilinear {keras_bilinear.__version__}, Keras "
        f"{keras.__version__}, {keras.config.backend()} backend. float32. The formula is "
        "`rank * (d1 * u1 + d2 * u2) + units`.",
        "",
        "| layer | parameters | by the formula | `.tflite` bytes |",
        "|---|---|---|---|",
    ]
    for width in (1024, 4096):
        parameters, size = sizes(keras.layers.Dense(width), width)
        lines.append(f"| full {width} -> {width} | {parameters:,} | | {size:,} |")
        for rank in (1, 4, 8):
            layer = BilinearDense(width, rank=rank)
            parameters, size = sizes(layer, width)
            (d1, d2), (u1, u2) = (
                layer.factorization.input_factors,
                layer.factorization.output_factors,
            )
            formula = rank * (d1 * u1 + d2 * u2) + width
            name = f"bilinear {width} -> {width}, rank {rank}"
            lines.append(f"| {name} | {parameters:,} | {formula:,} | {size:,} |")
    (tables.RESULTS / "size.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
