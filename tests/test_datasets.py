import sys

import keras
import pytest

from keras_bilinear import datasets

if keras.config.backend() != "tensorflow":
    pytest.skip("nothing here depends on the backend", allow_module_level=True)


def test_a_missing_package_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="needs sklearn: run `pip install"):
        datasets.load("digits")


@pytest.mark.parametrize("name", ["coco/2017", "squad", "mnist:9.9.9", "../digits"])
def test_a_data_set_of_another_kind(tmp_path, name):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match="data set"):
        datasets.load(name, str(tmp_path))


def test_without_a_network_a_data_set_is_not_downloaded(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"cannot download data set 'mnist'.*Error.*data_dir="):
        datasets.load("mnist", str(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
