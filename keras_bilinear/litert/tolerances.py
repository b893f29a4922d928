"""The kinds of LiteRT files."""

# For each kind of quantization, the largest difference from the model that is allowed.
TOLERANCES = {None: 1e-4, "float16": 1e-2, "dynamic_int8": 0.1, "int8": 0.2}
