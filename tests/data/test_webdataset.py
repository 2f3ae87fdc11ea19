from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from grood_cert.data import load_set
from tests.data.examples import COLOUR, refused


def write(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


EXPECTED = torch.from_numpy(COLOUR.transpose(0, 3, 1, 2).astype(np.float32) / 255)


@pytest.mark.parametrize(
    ("suffix", "label"),
    [
        ("cls", str),
        ("json", lambda label: json.dumps({"label": label})),
        ("json", json.dumps),
        ("cls", lambda x: f"{x}\n"),
    ],
)
def test_samples_of_shards(tmp_path, suffix, label):
    for shard in range(2):
        members = []
        for index in range(3 * shard, 3 * shard + 3):
            members += [
                (f"part/{index:03d}.png", png(COLOUR[index])),
                (f"part/{index:03d}.{suffix}", label(index % 2).encode()),
                (f"part/{index:03d}.txt", b"a caption"),
            ]
        write(tmp_path / f"x-{shard:02d}.tar", members)
    images = load_set(f"{tmp_path}/x-{{00..01}}.tar")
    assert torch.equal(images.images, EXPECTED) and images.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert images.files[0] == "part/000.png" and images.class_names == ("0", "1")
    assert images.note == "files left out: 6, neither images nor labels"
    assert len(load_set(f"{tmp_path}/x-00.tar:1")) == 1
    grey = load_set(f"{tmp_path}/x-01.tar", shape=(1, 6, 6))
    assert grey.shape == (1, 6, 6)
    assert grey.note.startswith("3 of 3 images made grey from RGB; 3 of 3 images fitted to 6x6; files left out: 3")


def test_images_alone(tmp_path):
    images = load_set(write(tmp_path / "x.tar", [(f"{index}.png", png(pixels)) for index, pixels in enumerate(COLOUR)]))
    assert torch.equal(images.images, EXPECTED) and not images.labels.any() and images.class_names == ("x.tar",)


def test_what_is_no_shard(tmp_path):
    picture = png(COLOUR[0])
    for members, message in (
        ([], "'.*' is empty: it holds no image such as KEY.png"),
        ([("a.png", b"nonsense")], "is empty: it holds no readable image"),
        ([("a.png", picture), ("a.jpg", picture)], "holds two images of one key: 'a.png' and 'a.jpg'"),
        ([("a.png", picture), ("a.cls", b"1"), ("b.png", picture)], "1 of 2 images have no label, the first 'b.png'"),
        ([("a.png", picture), ("a.cls", b"cat")], "label of 'a.png' in '.*x.tar' cannot be read"),
        (
            [("a.png", picture), ("a.json", b'{"caption": "cat"}')],
            "it is no class index, nor an object with one as 'label'",
        ),
        ([("a.png", picture), ("a.cls", b"-1")], "labels of '.*x.tar' run from -1 to -1"),
    ):
        with refused(message):
            load_set(write(tmp_path / "x.tar", members))
    path = tmp_path / "x.tar"
    path.write_bytes(path.read_bytes()[:600])
    with refused("file '.*x.tar' cannot be read as an unpacked tar file"):
        load_set(str(path))
    path.write_bytes(b"nonsense" * 100)
    with refused("file '.*x.tar' cannot be read as an unpacked tar file"):
        load_set(str(path))
    with refused("file 'none.tar' does not exist"):
        load_set("none.tar")
    with refused("the range {2..1} in '.*' runs backwards"):
        load_set(f"{tmp_path}/x-{{2..1}}.tar")
