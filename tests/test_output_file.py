import json

import pytest

from dmax_jax.errors import InputError
from dmax_jax.output_file import prepare_output, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = prepare_output(str(tmp_path / "new" / "out.json"))
    write_json(path, {"text": "ä"})
    with pytest.raises(TypeError):
        write_json(path, object())
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "ä"}
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a directory"):
        prepare_output(str(tmp_path))
    with pytest.raises(InputError, match="can't be made"):
        prepare_output(str(tmp_path / "file" / "out.json"))
