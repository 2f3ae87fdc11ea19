"""Archives and folders that point elsewhere: nothing is written, nothing outside is read, nothing goes round in circles."""

from __future__ import annotations

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from grood_cert.data import load_set
from grood_cert.data.folders import _walk
from grood_cert.errors import InputError


def picture(value=0):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(stream, format="png")
    return stream.getvalue()


def test_members_of_a_shard_are_read_where_they_lie_in_it(tmp_path):
    """Names that climb out of the folder are names; links in the archive are no images."""
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(200))
    with tarfile.open(work / "shard.tar", "w") as archive:
        for name in ("../climbed.png", "/tmp/absolute.png", "a/../../b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(picture())
            archive.addfile(member, io.BytesIO(picture()))
        for kind, name in ((tarfile.SYMTYPE, "soft.png"), (tarfile.LNKTYPE, "hard.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../secret.png"
            archive.addfile(member)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    found = load_set(str(work / "shard.tar"))
    assert len(found) == 3 and float(found.images.max()) == 0
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links here")
def test_links_that_lead_back_end(tmp_path):
    """Two of them in each folder would make 2^40 paths before the system says stop."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(picture())
    for place, name, target in (("a", "up", ".."), ("a", "b", "../b"), ("b", "a", "../a"), ("b", "self", ".")):
        (tmp_path / place / name).symlink_to(target)
    found = [path.relative_to(tmp_path).as_posix() for path in _walk(tmp_path)]
    assert found == ["a/x.png", "a/b/x.png", "b/x.png", "b/a/x.png"]


def test_arrays_with_pickles_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    np.savez(tmp_path / "a.npz", images=np.array([Bomb(), Bomb()], dtype=object))
    with pytest.raises(InputError, match="without pickles"):
        load_set(str(tmp_path / "a.npz"))
    assert not (tmp_path / "exploded").exists()
