"""What an unfinished run has made survives its end, and is nobody else's."""

import errno
import json
import os

import numpy as np
import pytest

from titok_fast.cli.runs import Parts

SETTINGS = {"model": "m", "revision": None, "images": "ab12"}


def test_parts_survive_and_come_back_in_order(tmp_path):
    output = tmp_path / "t.npz"
    parts = Parts(output, SETTINGS, interval=3600)
    assert parts.load()[1] is None
    parts.add([4, 6], np.array([[4, 4], [6, 6]]))  # the first is written at once
    parts.add([1], np.array([[1, 1]]))  # not written: lost with the process
    indices, tokens = Parts(output, SETTINGS).load()
    assert indices.tolist() == [4, 6] and tokens.tolist() == [[4, 4], [6, 6]]
    parts.flush()
    indices, tokens = Parts(output, SETTINGS).load()
    assert indices.tolist() == [1, 4, 6] and tokens[:, 0].tolist() == [1, 4, 6]
    parts.remove()
    assert list(tmp_path.iterdir()) == []


def test_parts_of_other_settings_are_refused(tmp_path):
    output = tmp_path / "t.npz"
    parts = Parts(output, SETTINGS)
    Parts(output, SETTINGS | {"model": "n"})  # nothing is lost yet: a clean start
    parts = Parts(output, SETTINGS)
    parts.add([0], np.zeros((1, 2), int))
    with pytest.raises(ValueError, match=r"\.t\.npz\.parts: .*other settings \(model m now n\)"):
        Parts(output, SETTINGS | {"model": "n"})
    assert Parts(output, SETTINGS).load()[0].tolist() == [0]
    (parts.folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not readable, delete its folder"):
        Parts(output, SETTINGS)


def refused(output):
    """Whether another process may not write the parts of `output`."""
    child = os.fork()
    if child == 0:
        try:
            Parts(output, SETTINGS)
        except ValueError as error:
            os._exit(7 if "another run is writing to it" in str(error) else 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 7)
    return status == 7


@pytest.mark.parametrize("count", [0, 1])
def test_two_runs_do_not_write_the_same_parts(tmp_path, count):
    parts = Parts(tmp_path / "t.npz", SETTINGS)
    parts.add(range(count), np.zeros((count, 2), int))
    assert refused(tmp_path / "t.npz")
    assert not refused(tmp_path / "u.npz")
    assert len(parts.load()[0]) == count
    parts.remove()
    assert not refused(tmp_path / "t.npz")


def test_locks_may_be_missing(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", missing)
    Parts(tmp_path / "t.npz", SETTINGS).remove()
    assert list(tmp_path.iterdir()) == []


def test_damaged_parts_are_made_anew(tmp_path):
    parts = Parts(tmp_path / "t.npz", SETTINGS, interval=0)
    parts.add([0], np.zeros((1, 2), int))
    parts.add([1], np.ones((1, 2), int))
    first, second = sorted(parts.folder.glob("0*.npz"))
    second.write_bytes(second.read_bytes()[:-30])
    assert parts.load()[0].tolist() == [0]
    assert first.exists() and not second.exists()


def test_an_interrupted_removal_leaves_nothing_behind(tmp_path):
    parts = Parts(tmp_path / "t.npz", SETTINGS)
    parts.add([0], np.zeros((1, 2), int))
    (parts.folder / "manifest.json").unlink()
    again = Parts(tmp_path / "t.npz", SETTINGS)
    assert again.load()[1] is None
    assert json.loads((again.folder / "manifest.json").read_text()) == SETTINGS
