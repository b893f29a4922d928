import pathlib

import keras
import pytest

if keras.config.backend() != "tensorflow":
    pytest.skip("the tutorials are written for this backend", allow_module_level=True)
jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = pathlib.Path(__file__).parents[1] / "tutorials"
SOURCES = sorted(FOLDER.glob("*.py"))
every_tutorial = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def contents(notebook):
    cells = [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]
    return cells, notebook.metadata.kernelspec, notebook.metadata.accelerator


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
    assert not any(cell.get("outputs") for cell in notebook.cells)


@every_tutorial
def test_notebook_opens_in_colab(source):
    first, second, *_ = jupytext.read(source).cells
    colab = "https://colab.research.google.com/github/keras-bilinear/keras-bilinear/blob/main"
    assert f"({colab}/tutorials/{source.stem}.ipynb)" in first.source
    assert second.source == '%pip install -q "keras-bilinear[tutorials]"'


@every_tutorial
def test_notebook_runs(source, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BILINEAR_QUICK", "1")
    notebook = jupytext.read(source.with_suffix(".ipynb"))
    # Cells with the tag "skip-execution", which install packages, are skipped.
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "dtype policy: " in printed
    assert "examples to train on" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs), "nothing is drawn"
