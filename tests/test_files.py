import os

import keras
import pytest

from keras_bilinear import files

if keras.config.backend() != "tensorflow":
    pytest.skip("nothing here depends on the backend", allow_module_level=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write into '.*below': .*file is no writable folder"):
        files.check_writable(tmp_path / "file" / "below")
    with pytest.raises(OSError, match="cannot write into"), files.staged(tmp_path / "file"):
        pass


def write_and_raise(target, error):
    with files.staged(target) as folder:
        (folder / "a").write_text("half")
        raise error


def test_staged_files_appear_together_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "folder"
    with files.staged(target) as folder:
        (folder / "a").write_text("a")
        assert os.listdir(target) == [folder.name]
    assert os.listdir(target) == ["a"]
    for error in (KeyboardInterrupt(), ValueError()):
        with pytest.raises(type(error)):
            write_and_raise(target, error)
    with pytest.raises(OSError, match=r"cannot write into .*No space left"):
        write_and_raise(target, OSError(28, "No space left on device"))
    assert os.listdir(target) == ["a"]
    assert (target / "a").read_text() == "a"
