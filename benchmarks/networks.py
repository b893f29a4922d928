"""The networks of the studies, full and bilinear ones, as a `training.Run` says."""

import math

UNKNOWN = 1  # The id of words that are not in the vocabulary.
CONVOLUTIONAL = ("cifar10", "spoken_digit")  # Where the network is not recurrent.


def build(run, dataset):
    layers = _Layers(run)
    if run.recurrent:
        return _recurrent(run, dataset, layers)
    if run.architecture == "resnet20":
        return _resnet(run, dataset, layers)
    if run.dataset in CONVOLUTIONAL:
        return _vgg(run, dataset, layers)
    return _mlp(run, dataset, layers)


class _Layers:
    """Stock layers, or bilinear ones of the ranks of a run."""

    def __init__(self, run):
        import keras

        import keras_bilinear

        self.stock, self.bilinear = keras.layers, keras_bilinear
        self.run = run
        self.ranks = run.rank if isinstance(run.rank, tuple) else [run.rank] * len(run.hidden)

    def __call__(self, name, *args, rank, **kwargs):
        if not rank:
            return getattr(self.stock, name)(*args, **kwargs)
        return getattr(self.bilinear, f"Bilinear{name}")(*args, rank=rank, **kwargs)

    def embedding(self, vocabulary, width):
        kwargs = {}
        if self.run.pattern == "low-rank":
            kwargs = {"input_factors": (vocabulary, 1), "output_factors": (1, width)}
        if self.run.pattern == "halves":
            kwargs = {"input_factors": (2, vocabulary // 2), "output_factors": (width, 1)}
        return self("Embedding", vocabulary, width, rank=self.ranks[0], **kwargs)

    def dropout(self):
        return [self.stock.Dropout(self.run.dropout)] if self.run.dropout else []

    def dense(self, units, **kwargs):
        return self("Dense", units, rank=self.ranks[-1], **kwargs)

    def classes(self, dataset):
        return self.dense(dataset.classes, dtype="float32")

    def recurrent(self, units, **kwargs):
        return self(self.run.recurrent, units, rank=self.ranks[-1], **kwargs)

    def conv(self, filters, size=3, **kwargs):
        if self.run.rank:
            kwargs["pattern"] = self.run.pattern
        return self("Conv2D", filters, size, padding="same", rank=self.run.rank, **kwargs)


def _recurrent(run, dataset, layers):
    import keras

    from keras_bilinear import datasets

    *embedding_widths, units = run.hidden
    vocabulary = datasets.VOCABULARY if dataset.kind == "text" else dataset.classes
    inputs = keras.Input(dataset.x_train.shape[1:], dtype=dataset.x_train.dtype.name)
    x = inputs
    if run.pattern == "frequent half":
        vocabulary //= 2
        x = keras.ops.where(x < vocabulary, x, UNKNOWN)
    for layer in (
        *(layers.embedding(vocabulary, width) for width in embedding_widths),
        *layers.dropout(),
        layers.recurrent(units, return_sequences=dataset.kind == "characters"),
        *layers.dropout(),
        layers.classes(dataset),
    ):
        x = layer(x)
    return keras.Model(inputs, x)


def _vgg(run, dataset, layers):
    """Blocks of convolutions, the last of each of stride 2, and a dense layer."""
    import keras

    *blocks, units = run.hidden
    hidden = []
    for filters in blocks:
        for strides in (*[1] * (run.depth - 1), 2):
            hidden.append(layers.conv(filters, strides=strides, activation="relu"))
        hidden += layers.dropout()
    hidden += [
        keras.layers.Flatten(),
        layers.dense(units, activation="relu"),
        *layers.dropout(),
    ]
    return keras.Sequential([*_image(dataset), *hidden, layers.classes(dataset)])


def _resnet(run, dataset, layers):
    """Three stages of residual blocks of two convolutions (He et al., arXiv 1512.03385).

    The first block of the second and third stage has stride 2, and a 1x1 convolution
    beside it.
    """
    import keras

    def conv(x, filters, size=3, strides=1):
        x = layers.conv(filters, size, strides=strides, use_bias=False)(x)
        return keras.layers.BatchNormalization()(x)

    def relu(x):
        return keras.layers.ReLU()(x)

    inputs, image = _image(dataset)
    x = image(inputs)
    x = relu(conv(x, run.hidden[0]))
    for stage, filters in enumerate(run.hidden):
        for block in range(run.depth):
            strides = 2 if stage and not block else 1
            y = relu(conv(x, filters, strides=strides))
            y = conv(y, filters)
            shortcut = x if strides == 1 else conv(x, filters, size=1, strides=strides)
            x = relu(keras.layers.Add()([shortcut, y]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.classes(dataset)(x))


def _image(dataset):
    """An input, and a layer that gives it an axis of channels."""
    import keras

    height, width, *channels = dataset.x_train.shape[1:]
    shape = height, width, math.prod(channels)
    return keras.Input((height, width, *channels)), keras.layers.Reshape(shape)


def _mlp(run, dataset, layers):
    import keras

    from keras_bilinear import datasets

    if dataset.kind == "text":
        inputs = keras.Input(dataset.x_train.shape[1:], dtype="int32")
        first = [
            layers.embedding(datasets.VOCABULARY, 128),
            keras.layers.GlobalAveragePooling1D(),
        ]
    else:
        inputs = keras.Input(dataset.x_train.shape[1:])
        first = [keras.layers.Flatten()]
    hidden = []
    for units in run.hidden:
        hidden += [layers.dense(units, activation="relu"), *layers.dropout()]
    return keras.Sequential([inputs, *first, *hidden, layers.classes(dataset)])
