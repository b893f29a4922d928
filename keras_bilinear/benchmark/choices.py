"""What the benchmark can measure, and on what."""

# For each column of the tables: the Keras backend, whether XLA compiles everything, and further
# environment variables. TensorFlow uses Intel's oneDNN library by itself on some CPUs only; the
# column "tensorflow" is without it.
COLUMNS: dict[str, tuple[str, bool, dict[str, str]]] = {
    "tensorflow": ("tensorflow", False, {"TF_ENABLE_ONEDNN_OPTS": "0"}),
    "onednn": ("tensorflow", False, {"TF_ENABLE_ONEDNN_OPTS": "1"}),
    "xla": ("tensorflow", True, {}),
    "jax": ("jax", True, {}),
    "torch": ("torch", False, {}),
}

# For each suite that measures memory, the suite whose layers it takes.
MEMORY = {f"{suite}_memory": suite for suite in ("conv", "recurrent")}

# The suites that measure time, which are the keys of `cases.CASES`, and those of memory.
SUITES = ("dense", "embedding", "conv", "recurrent", "huge", *MEMORY)
