"""Results as a notebook and a script show them, in a real Jupyter kernel."""

import base64

import keras
import pytest

if keras.config.backend() != "tensorflow":
    pytest.skip("no backend takes part: once is enough", allow_module_level=True)
for package in ("ipykernel", "matplotlib"):
    pytest.importorskip(package)
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

BOX = set("┏━┳┓┃┡╇┩│├┼┤└┴┘─╭╮╰╯")
# Made without a model, so that neither the kernel nor the script imports a backend's rest.
RESULTS = """
from keras_bilinear.litert.report import LiteRTReport
from keras_bilinear.reports.summary import Comparison, LayerSummary, Summary
from keras_bilinear.rewriting.plan import LayerPlan, RewritePlan

layer = LayerSummary("block/<dense>", "Dense", 1000, 4000, 1000, 80)
summary = Summary("net [red]", (layer,), 1000, 4000, 1000, 80, 0.5, 0.9)
comparison = Comparison(summary, summary)
plan = RewritePlan([LayerPlan("dense", "Dense", 1000, reason="a < b")])
report = LiteRTReport("a/small.tflite", 1, {"ADD": 2}, 1, 1, None, 1.0, 0.0, 1.0)
"""
CELLS = {
    "results": RESULTS,
    "plan": "plan",
    "comparison": "comparison",
    "summary": "summary",
    "report": "report",
    "displayed": "display(plan)",
    "printed": "print(plan)",
    "text": "print(len(str(plan)) > 100, len(str(comparison)) > 100)",
    # The first figure of the kernel: nothing else has been drawn.
    "plotted": "comparison.plot()",
    "in_between": "summary.plot()\nNone",
    "kept": "figure = summary.plot()",
    "kept_is_shown": "figure",
    "written": "summary.plot('written.png')",
    "saved": """
import matplotlib.pyplot as plt
figure = summary.plot()
plt.gcf().savefig("saved.png")
print(plt.gcf() is figure)
""",
    "others": "plt.plot([1, 2])\nNone",
    "open": "print(plt.get_fignums())",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The outputs of each cell, and the folder in which the notebook ran."""
    folder = tmp_path_factory.mktemp("notebook")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS.values()]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(folder)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)  # Jupyter then sets its own.
        nbclient.NotebookClient(
            notebook, kernel_name="python3", timeout=120, resources=resources
        ).execute()
    return {
        "folder": folder,
        **{name: cell.outputs for name, cell in zip(CELLS, notebook.cells, strict=True)},
    }


def printed(outputs):
    assert [output.output_type for output in outputs] == ["stream"]
    return outputs[0].text


@pytest.mark.parametrize("name", ["plan", "comparison", "summary", "report", "displayed"])
def test_a_result_is_shown_once_as_an_html_table(outputs, name):
    (output,) = outputs[name]
    table = output.data["text/html"]
    assert table.count("<table>") == table.count("</table>") == 1
    assert table.count("<tr>") == table.count("</tr>") > 1
    assert not BOX & {*table}
    assert "<pre" not in table


def test_texts_are_escaped_in_an_html_table(outputs):
    (summary,), (plan,) = outputs["summary"], outputs["plan"]
    table = summary.data["text/html"]
    assert '<td style="text-align: left">block/&lt;dense&gt;</td>' in table
    assert '<td style="text-align: right">1,000</td>' in table
    assert "<caption><strong>net [red]: 1 k parameters" in table
    assert table.count("<tfoot>") == 1
    assert "a &lt; b" in plan.data["text/html"]
    assert "<small>error: the predicted" in plan.data["text/html"]


def test_a_result_prints_as_text(outputs):
    text = printed(outputs["printed"])
    assert "left alone because" in text
    assert BOX & {*text}
    assert printed(outputs["text"]).strip() == "True True"


@pytest.mark.parametrize("name", ["plotted", "in_between", "kept", "kept_is_shown", "written"])
def test_a_figure_is_shown_once(outputs, name):
    (output,) = outputs[name]
    assert len(base64.b64decode(output.data["image/png"])) > 10_000


def test_figures_of_others_are_shown_as_before(outputs):
    (output,) = outputs["others"]
    assert "image/png" in output.data
    assert printed(outputs["open"]).strip() == "[]"


def test_the_current_figure_is_the_one_that_was_plotted(outputs):
    stream, picture = outputs["saved"]
    assert stream.text.strip() == "True"
    assert "image/png" in picture.data
    for name in ("saved.png", "written.png"):
        assert (outputs["folder"] / name).stat().st_size > 10_000


def test_a_figure_of_a_script_is_saved(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    results: dict = {}
    exec(RESULTS, results)
    figure = results["summary"].plot()
    assert pyplot.gcf() is figure
    pyplot.gcf().savefig(tmp_path / "saved.png")
    pyplot.close(figure)
    results["summary"].plot(tmp_path / "written.png")
    assert not pyplot.get_fignums(), "a figure that is written stays open"
    saved, written = ((tmp_path / name).read_bytes() for name in ("saved.png", "written.png"))
    assert saved == written
    assert len(saved) > 10_000
