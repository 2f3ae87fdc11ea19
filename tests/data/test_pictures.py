from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from grood_cert.data import FOLDERS, load_experiment, load_pictures, load_set
from tests.data.examples import COLOUR, GREY, RNG, classes_on_disk, hashes, refused


def test_flat_folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, pixels in enumerate(GREY):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("not an image")
    images = load_set(f"{folder}/")
    assert (images.name, images.class_names, images.shape) == ("pictures", ("pictures",), (1, 4, 5))
    assert torch.equal(images.images, torch.from_numpy(GREY[:, None].astype(np.float32) / 255))
    assert load_set(str(folder), shape=(3, 4, 5)).shape == (3, 4, 5)
    assert load_set(str(folder), shape=(1, 7, 3)).shape == (1, 7, 3)
    Image.fromarray(COLOUR[0]).save(folder / "colour.png")
    assert load_set(str(folder)).shape == (3, 4, 5)
    assert len(load_set(str(folder), shape=(1, 4, 5))) == 7


def test_class_folders(tmp_path):
    for index, pixels in enumerate(COLOUR):
        folder = tmp_path / ["cat", "dog", "elk"][index % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (tmp_path / ".cache").mkdir()
    images = load_set(str(tmp_path))
    assert (images.class_names, images.labels.tolist()) == (("cat", "dog", "elk"), [0, 0, 1, 1, 2, 2])
    expected = COLOUR[[0, 3, 1, 4, 2, 5]].transpose(0, 3, 1, 2).astype(np.float32) / 255
    assert torch.equal(images.images, torch.from_numpy(expected))
    chosen = load_set(f"{tmp_path}:2,0")
    assert (chosen.class_names, chosen.labels.tolist()) == (("elk", "cat"), [1, 1, 0, 0])
    Image.fromarray(GREY[0]).save(tmp_path / "loose.png")
    with refused("both sub-folders and loose images such as 'loose.png'"):
        load_set(str(tmp_path))


def test_images_keep_the_names_of_their_files(tmp_path):
    """Through the choice of classes and the cuts of an experiment; each names the picture that the image shows."""
    classes_on_disk(tmp_path / "a", "pqr", count=8)
    classes_on_disk(tmp_path / "b/deep", "s", count=6)
    whole = load_set(str(tmp_path / "a"))
    assert whole.files == tuple(f"{name}/{index}.png" for name in "pqr" for index in range(8))
    assert load_set(f"{tmp_path / 'a'}:2,0").files == tuple(
        f"{name}/{index}.png" for name in "pr" for index in range(8)
    )
    assert whole.select(whole.labels == 1).files == tuple(f"q/{index}.png" for index in range(8))
    assert load_set(str(tmp_path / "b")).files == tuple(f"deep/s/{index}.png" for index in range(6))
    sets = load_experiment(id=f"{tmp_path / 'a'}:2,0", auxiliary=str(tmp_path / "b"), ood=["smooth-noise"])
    for part, folder in ((sets.train, "a"), (sets.calibration, "a"), (sets.test, "a"), (sets.auxiliary, "b")):
        assert len(part.files) == len(part) > 0
        for image, file in zip(part.images, part.files, strict=True):
            pixels = np.asarray(Image.open(tmp_path / folder / file)).transpose(2, 0, 1).astype(np.float32)
            assert torch.equal(image, torch.from_numpy(pixels / 255))
    assert load_set("digits").select([3, 1]).files == ()


def test_folder_is_resized_to_cover_and_cropped(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "b.jpg", quality=100)
    with refused("images of different sizes: .*b.jpg' is 60x20, .*a.png' 20x60; resize them"):
        load_set(str(tmp_path))
    assert load_set(str(tmp_path), shape=(3, 10, 10)).images[:, :, 2:8, 2:8].min() > 0.95


def test_16_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896], [40000, 65000, 65535]], np.uint16)).save(tmp_path / "deep.png")
    images = load_set(str(tmp_path)).images[0, 0] * 255
    assert images.round().tolist() == [[0, 1, 128], [156, 253, 255]]


def test_unreadable_folders(tmp_path):
    with refused("is empty: it holds no readable image"):
        load_set(str(tmp_path))
    (tmp_path / "sub").mkdir()
    with refused("is empty: it holds no readable image"):
        load_set(str(tmp_path))
    (tmp_path / "sub/bad.png").write_bytes(b"nonsense")
    with refused("is empty: it holds no readable image"):
        load_set(str(tmp_path))
    Image.fromarray(GREY[0]).save(tmp_path / "sub/good.png")
    with refused("has 1 unreadable images, the first .*bad.png"):
        load_set(str(tmp_path))
    (tmp_path / "sub/bad.png").write_bytes((tmp_path / "sub/good.png").read_bytes()[:-30])
    with refused("has 1 unreadable images, the first .*bad.png"):
        load_set(str(tmp_path))


@pytest.mark.parametrize("source", FOLDERS)
def test_missing_named_folders_say_what_is_expected(tmp_path, source):
    folder = tmp_path / FOLDERS[source] / ("val" if source == "imagenet" else "")
    with refused(
        f"data set '{source}' is not in '{tmp_path}': there is no folder '{folder}' of pictures; .*--data-dir"
    ):
        load_set(source, data_dir=tmp_path, shape=(3, 32, 32))
    folder.mkdir(parents=True)
    with refused(f"folder '{folder}' is empty"):
        load_set(source, data_dir=tmp_path, shape=(3, 32, 32))


def test_a_picture_that_claims_to_be_huge_is_not_decoded(tmp_path):
    """A PNG of 100 bytes whose header speaks of 3.6 GB."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    for shape in (None, (1, 8, 8)):
        with refused("huge.png': .*exceeds limit"):
            load_set(str(tmp_path), shape=shape)


def test_named_folders_are_fitted_as_in_the_paper(tmp_path):
    """LSUN-C: centre crop alone; LSUN-R, iSUN: as they are; Places365: resize and crop."""
    pixels = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for folder, picture in (
        ("LSUN/test", pixels[:36, :36]),
        ("LSUN_resize/LSUN_resize", pixels[:32, :32]),
        ("iSUN", pixels[:32, :32]),
        ("places365/test_256", np.repeat(np.repeat(pixels[:, 4:36], 4, 0), 4, 1)),
    ):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / folder / "0.png")

    def loaded(source):
        images = load_set(source, data_dir=tmp_path, shape=(3, 32, 32))
        assert (images.name, images.kind, images.shape) == (source, "ood", (3, 32, 32))
        return (images.images[0] * 255).round().byte().permute(1, 2, 0).numpy()

    assert np.array_equal(loaded("lsun-c"), pixels[2:34, 2:34])
    assert np.array_equal(loaded("lsun-r"), pixels[:32, :32])
    assert np.array_equal(loaded("isun"), pixels[:32, :32])
    shrunk = Image.fromarray(np.repeat(np.repeat(pixels[:, 4:36], 4, 0), 4, 1)).resize(
        (32, 40), Image.Resampling.BILINEAR
    )
    assert np.array_equal(loaded("places365"), np.asarray(shrunk)[4:36])
    with refused("picture '.*LSUN/test/0.png' cannot be used: it is 36x36, too small to crop 40x40 from it"):
        load_set("lsun-c", data_dir=tmp_path, shape=(3, 40, 40))


def test_imagenet_pictures_are_resized_to_256_and_cropped_to_224(tmp_path):
    gradient = np.broadcast_to(np.linspace(0, 255, 512).astype(np.uint8)[:, None, None], (512, 600, 3))
    Image.fromarray(np.ascontiguousarray(gradient)).save(tmp_path / "a.png")
    image = load_set(str(tmp_path), shape=(3, 224, 224)).images[0, 0]
    assert (image[0, 0].item(), image[-1, 0].item()) == pytest.approx((16.5 / 256, 1 - 16.5 / 256), abs=0.004)
    Image.fromarray(np.ascontiguousarray(gradient[:224, :224])).save(tmp_path / "a.png")
    image = load_set(str(tmp_path), shape=(3, 224, 224)).images[0, 0]
    assert (image[:, 0] * 255).round().tolist() == gradient[:224, 0, 0].tolist(), "a picture of the right size stays"


def test_class_lists(tmp_path):
    pictures = classes_on_disk(tmp_path / "some@where/train", "abcd")
    names = tmp_path / "two.txt"
    names.write_text("# chosen by hand\n c\n\na\n")
    folder = str(tmp_path / "some@where/train")
    chosen = load_set(f"{folder}@{names}", shape=(3, 8, 8))
    assert (chosen.name, chosen.class_names) == ("train@two.txt", ("c", "a"))
    for index, name in enumerate("ca"):
        expected = torch.from_numpy(pictures[name].transpose(0, 3, 1, 2).astype(np.float32) / 255)
        assert torch.equal(chosen.images[chosen.labels == index], expected)
    others = load_set(f"{folder}@!{names}", shape=(3, 8, 8))
    assert (others.name, others.class_names) == ("train@!two.txt", ("b", "d"))
    assert not hashes(chosen) & hashes(others) and len(chosen) + len(others) == 20
    assert load_set(f"{folder}@{names}:1", shape=(3, 8, 8)).class_names == ("a",)
    assert load_set(f"{folder}@{names}").shape == (3, 224, 224), "the shape of ImageNet by default"
    assert load_set(folder, shape=(3, 8, 8)).class_names == tuple("abcd")
    for text, message in (
        ("a\nx\ny\n", "has no class folder x, which the list '.*' names, nor 1 others"),
        ("a\nb\na\n", "class list '.*' names a twice"),
        ("# nothing\n", "class list '.*' is empty"),
    ):
        names.write_text(text)
        with refused(message):
            load_set(f"{folder}@{names}")
    names.write_text("a\nb\nc\nd\n")
    with refused("is empty: the list names every class folder"):
        load_set(f"{folder}@!{names}")
    with refused("class list 'none' cannot be read \\(No such file or directory\\); .* or one of imagenet-10"):
        load_set(f"{folder}@none")


def test_a_damaged_picture_of_a_stored_folder_is_named_when_it_is_read(tmp_path, monkeypatch):
    classes_on_disk(tmp_path, "a")
    monkeypatch.setattr("grood_cert.data.images.IN_MEMORY", 0)
    images = load_set(str(tmp_path), shape=(3, 8, 8))
    (tmp_path / "a/3.png").write_bytes(b"nonsense")
    assert len(images.images[:3]) == 3
    with refused("picture '.*a/3.png' cannot be used: cannot identify image file"):
        images.content_hash()


def test_what_was_left_out_converted_and_fitted_is_counted(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    grey = Image.fromarray(GREY[0])
    for name, mode in (("l", "L"), ("rgb", "RGB"), ("rgba", "RGBA"), ("p", "P"), ("la", "LA")):
        grey.convert(mode).save(folder / f"{name}.png")
    grey.resize((9, 9)).save(folder / "large.png")
    grey.save(folder / "moving.gif")
    (folder / "notes.txt").write_text("none")
    (folder / "._l.png").write_bytes(b"what other systems leave behind")
    found = load_set(str(tmp_path), shape=(1, 4, 5))
    assert len(found) == 6 and found.note == (
        "1 of 6 images made grey from grey with transparency; 1 of 6 images fitted to 4x5; 1 of 6 images made grey from "
        "a palette; 1 of 6 images made grey from RGB; 1 of 6 images made grey from RGBA; files left out: 1 .gif, 1 .txt"
    )
    assert load_set("digits", shape=(3, 8, 8)).note == "1797 of 1797 images made RGB from grey"
    assert load_set("digits").note == ""
    with refused("image '.*large.png' is 9x9, the model expects 4x5"):
        load_set(str(tmp_path), shape=(1, 4, 5), resize=False)
    fitted = load_set("digits:0", shape=(1, 4, 4), resize=True)
    assert (fitted.shape, fitted.note) == ((1, 4, 4), "178 of 178 images fitted to 4x4")


def test_a_picture_is_a_set_of_one(tmp_path):
    Image.fromarray(GREY[0]).save(tmp_path / "x.png")
    path = str(tmp_path / "x.png")
    found = load_set(path)
    assert (len(found), found.name, found.files, found.shape) == (1, "x.png", (path,), (1, 4, 5))
    assert load_pictures([path, path]).files == (path, path)
    with refused("picture 'none.png' does not exist"):
        load_set("none.png")
