"""Files are written whole, under names that nobody can have prepared."""

import os
import signal

import pytest

from pipeline_ext import PipelineError
from pipeline_ext.base import files
from pipeline_ext.base.files import whole_file


def test_a_link_under_the_name_of_an_unfinished_file_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "trace.json.tmp").symlink_to(victim)
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "guessed")
    (tmp_path / ".trace.json.guessed.tmp").symlink_to(victim)
    with pytest.raises(PipelineError, match="File exists"), whole_file(tmp_path / "trace.json"):
        pass
    assert victim.read_text() == "precious"
    monkeypatch.undo()
    with whole_file(tmp_path / "trace.json") as file:
        file.write(b"trace")
    assert victim.read_text() == "precious"
    assert (tmp_path / "trace.json").read_bytes() == b"trace" and not (tmp_path / "trace.json").is_symlink()


def test_two_writers_of_one_file_do_not_mix_or_disturb_one_another(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as first:
        first.write(b"first")
        with whole_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_dead_writer_has_left_is_removed_and_what_is_not_its_stays(tmp_path):
    path = tmp_path / "file"
    child = os.fork()
    if child == 0:
        with whole_file(path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / ".file.notes").touch()
    assert len(os.listdir(tmp_path)) == 2
    with whole_file(path):
        pass
    assert sorted(os.listdir(tmp_path)) == [".file.notes", "file"]


def test_a_link_to_the_file_itself_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    with whole_file(tmp_path / "link") as file:
        file.write(b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_bytes() == b"x"
