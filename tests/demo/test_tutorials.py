import pathlib
import re
import sys
import tomllib
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from keras_bilinear import datasets
from keras_bilinear.demo import tutorials

if keras.config.backend() != "tensorflow":
    pytest.skip("the tutorials are written for this backend", allow_module_level=True)
jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
jupyter_client = pytest.importorskip("jupyter_client")
nbformat = pytest.importorskip("nbformat")
tf = pytest.importorskip("tensorflow")
for package in ("ipykernel", "matplotlib", "sklearn", "tensorflow_datasets"):
    pytest.importorskip(package)

FOLDER = pathlib.Path(__file__).parents[2] / "tutorials"
SOURCES = sorted(FOLDER.glob("*.py"))
# To be stored by `python benchmarks/tutorials.py --store` on a machine that does nothing else, as
# some show times.
NOT_STORED = ("cifar10",)
every_tutorial = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def contents(notebook):
    cells = [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]
    return cells, notebook.metadata.kernelspec, notebook.metadata.get("accelerator")


def test_there_are_no_other_notebooks():
    notebooks = sorted(FOLDER.glob("*.ipynb"))
    assert notebooks
    assert notebooks == [source.with_suffix(".ipynb") for source in SOURCES]


@every_tutorial
def test_notebook_is_what_its_source_makes(source):
    notebook = jupytext.read(source.with_suffix(".ipynb"))
    assert contents(notebook) == contents(jupytext.read(source)), (
        f"Run: jupytext --to ipynb --update tutorials/{source.name}"
    )


@every_tutorial
def test_the_outputs_of_a_full_run_are_stored(source):
    notebook = jupytext.read(source.with_suffix(".ipynb"))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if source.stem in NOT_STORED:
        assert not any(cell.outputs for cell in cells)
        return
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    texts = [output.text for output in outputs if output.output_type == "stream"]
    for output in outputs:
        texts += [str(v) for kind, v in output.get("data", {}).items() if kind != "image/png"]
    text = "\n".join(texts)
    assert "dtype policy: float32" in text
    assert re.search(r"\d,\d{3} examples to train on", text), "a quick run"
    assert "in the place of" not in text
    # Neither folders of a machine nor addresses.
    assert not re.findall(r"(?:^|[\s'\"(=])(?:~|[A-Z]:)?[/\\][\w.-]+[/\\].*", text)
    assert "://" not in text


@every_tutorial
def test_a_gpu_is_asked_for_where_it_helps(source):
    asks = jupytext.read(source.with_suffix(".ipynb")).metadata.get("accelerator")
    helps = source.stem in ("cifar10", "imdb_reviews", "spoken_digit")
    assert asks == ("GPU" if helps else None)


def first_code(source):
    return next(cell for cell in jupytext.read(source).cells if cell.cell_type == "code").source


def test_all_notebooks_install_the_package_in_the_same_way():
    (cell,) = {first_code(source) for source in SOURCES}
    assert "REPOSITORY" in cell


@every_tutorial
def test_no_notebook_names_a_place_that_may_not_exist(source):
    lines = [line for line in source.read_text().splitlines() if "REPOSITORY = " not in line]
    assert len(lines) == len(source.read_text().splitlines()) - 1
    assert "://" not in "\n".join(lines)


ADDRESS = "https://example.org/keras_bilinear"


@pytest.mark.parametrize(
    ("folder", "repository", "package"),
    [
        (FOLDER, "", f"{FOLDER.parent}[tutorials]"),
        (FOLDER, ADDRESS, f"{FOLDER.parent}[tutorials]"),
        (None, ADDRESS, f"keras-bilinear[tutorials] @ git+{ADDRESS}"),
        (None, "", None),
    ],
    ids=["clone", "clone_first", "repository", "neither"],
)
def test_a_package_that_is_missing_is_installed(folder, repository, package, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, check: ran.append(command))
    monkeypatch.chdir(folder or tmp_path)
    cell, count = re.subn(
        r'^REPOSITORY = "[^"]*"', f'REPOSITORY = "{repository}"', first_code(SOURCES[0]), flags=re.M
    )
    assert count == 1
    if package is None:
        with pytest.raises(ValueError, match="`REPOSITORY` must be the address"):
            exec(cell, {})
        assert not ran
        return
    exec(cell, {})
    assert ran == [[sys.executable, "-m", "pip", "install", "-q", package]]
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    assert project["name"] == "keras-bilinear"
    assert "tutorials" in project["optional-dependencies"]


def test_a_package_that_is_there_is_not_installed(monkeypatch):
    monkeypatch.setattr("subprocess.run", None)
    exec(first_code(SOURCES[0]), {})


@pytest.fixture(scope="module")
def kernel():
    """A kernel for all notebooks: most of what a short one takes is to import TensorFlow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BILINEAR_QUICK", "1")
        manager = jupyter_client.KernelManager(kernel_name="python3")
        manager.start_kernel()
        yield manager
        manager.shutdown_kernel(now=True)


# Makes the kernel like a new one, in another folder.
RESET = """
%reset -f
import os
os.chdir({path!r})
import keras
keras.backend.clear_session()
keras.config.set_dtype_policy("float32")
%reset -f
"""


@every_tutorial
def test_notebook_runs(source, kernel, tmp_path):
    notebook = jupytext.read(source.with_suffix(".ipynb"))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(RESET.format(path=str(tmp_path))))
    client = nbclient.NotebookClient(notebook, km=kernel, timeout=300)
    client.execute(cleanup_kc=False)
    client.kc.stop_channels()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "dtype policy: " in printed
    assert "examples to train on" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs), "nothing is drawn"


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "classes"),
    [
        ("fashion_mnist", (28, 28, 1), "float32", 10),
        ("cifar10", (32, 32, 3), "float32", 10),
        ("imdb_reviews", (datasets.TOKENS,), "int32", 2),
        ("spoken_digit", (tutorials.SAMPLING_RATE,), "float32", 10),
    ],
)
def test_data_in_the_place_of_others_have_their_form(
    name, shape, dtype, classes, monkeypatch, capsys
):
    monkeypatch.setattr(tutorials, "QUICK", True)
    monkeypatch.setattr(tutorials, "_is_prepared", lambda name: False)
    dataset = tutorials.load(name)
    assert f"in the place of {name}" in capsys.readouterr().out
    assert dataset.classes == classes
    for x, y in ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)):
        assert x.shape == (tutorials.QUICK_EXAMPLES, *shape)
        assert x.dtype == dtype
        assert {*y} == {*range(classes)}
        assert 0 < x.max() < datasets.VOCABULARY
    assert (dataset.x_train != dataset.x_test).any()


def test_only_so_many_examples_are_read():
    images = np.arange(40, dtype="uint8").reshape(10, 2, 2, 1)
    builder = SimpleNamespace(
        as_dataset=lambda split, as_supervised: tf.data.Dataset.from_tensor_slices(
            (images, np.arange(10))
        )
    )
    for examples, count in ((3, 3), (-1, 10)):
        x, y = datasets._read(builder, "train", "image", examples)
        np.testing.assert_array_equal(x, images[:count].astype("float32") / 255)
        np.testing.assert_array_equal(y, np.arange(count))
