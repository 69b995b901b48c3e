"""What can be given as data, what becomes of it, and what is refused in which words."""

import io
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import assay
from assay.data import Data, load_data

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2])


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """cat: images 0, 3, 5 of COLOUR; dog: 1, 4; emu: 2."""
    for name, rows in {"dog": (1, 4), "cat": (0, 3, 5), "emu": (2,)}.items():
        (tmp_path / "val" / name).mkdir(parents=True)
        for row in rows:
            (tmp_path / "val" / name / f"{row}.png").write_bytes(png(COLOUR[row]))
    return tmp_path / "val"


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module into the current directory, as users have it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    return write


def write_parquet(path, images, labels, metadata=None, **options):
    table = pa.table({"image": images, "label": labels})
    pq.write_table(table.replace_schema_metadata(metadata), path, **options)
    return path


def chw(image):
    return torch.from_numpy(image).permute(2, 0, 1) / 255


def refused(source, *words, **options):
    """Loading, or at the latest checking, ends in a DataError with these words in it."""
    with pytest.raises(assay.DataError) as e:
        load_data(source, **options).check()
    assert e.value.exit_code == 3
    for word in words:
        assert str(word) in str(e.value)
    return e.value


# What data is


def test_data_knows_its_length_shape_labels_and_gives_any_rows():
    data = load_data((COLOUR, Y))
    assert isinstance(data, Data)
    assert (len(data), data.shape, data.class_names) == (6, (3, 5, 7), None)
    assert data.labels.dtype == torch.int64
    x = data.batch(torch.tensor([4, 0]))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.stack([chw(COLOUR[4]), chw(COLOUR[0])]), rtol=0, atol=0)


def test_data_iterates_in_batches():
    data = load_data((COLOUR, Y))
    assert [len(y) for _, y in data] == [6]
    assert [len(y) for _, y in data.batches(4)] == [4, 2]
    assert torch.equal(torch.cat([x for x, _ in data.batches(4)]), data.batch(range(6)))


def test_limit_takes_the_first_samples():
    data = load_data((COLOUR, Y), limit=4)
    assert len(data) == 4
    assert torch.equal(data.labels, torch.tensor([0, 1, 2, 0]))
    assert len(load_data((COLOUR, Y), limit=1000)) == 6
    refused((COLOUR, Y), "at least 1", limit=0)


def test_fingerprint_is_of_contents_and_labels_that_are_used():
    def of(x, y, **options):
        return load_data((x, y), **options).fingerprint()

    assert of(COLOUR, Y) == of(torch.from_numpy(COLOUR.copy()), Y)
    changed = COLOUR.copy()
    changed[5, 0, 0, 0] ^= 1
    assert of(COLOUR, Y) != of(changed, Y)
    assert of(COLOUR, Y) != of(COLOUR, Y[::-1])
    assert of(COLOUR, Y, limit=5) == of(changed, Y, limit=5) != of(COLOUR, Y)
    assert len(of(COLOUR, Y)) == 64


def test_handing_out_a_batch_gives_nobody_access_to_what_is_kept():
    x = torch.rand(3, 4)
    data = load_data((x, [0, 1, 0]))
    data.batch([0, 1, 2]).zero_()
    assert torch.equal(data.batch([0, 1, 2]), x)


# Arrays


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (np.zeros((2, 5, 7), np.uint8), (1, 5, 7)),
        (np.zeros((2, 5, 7, 3), np.uint8), (3, 5, 7)),
        (np.zeros((2, 3, 5, 7), np.uint8), (3, 5, 7)),
        (np.zeros((2, 3, 3, 3), np.uint8), (3, 3, 3)),
        (np.zeros((2, 5, 7, 1), np.float32), (1, 5, 7)),
        (np.zeros((2, 20)), (20,)),
        (np.zeros((2, 5, 7)), (5, 7)),
        (torch.zeros(2, 5, 7, dtype=torch.uint8), (1, 5, 7)),
        (torch.zeros(2, 5, 7, 3), (5, 7, 3)),  # float tensors are what the model takes
    ],
)
def test_which_axis_of_an_array_is_what(x, shape):
    data = load_data((x, [0, 1]))
    assert data.shape == shape
    assert data.batch([1]).shape == (1, *shape)


def test_floats_are_not_scaled():
    x = RNG.random((4, 6)) * 9
    torch.testing.assert_close(load_data((x, [0, 1, 0, 1])).batch(range(4)), torch.from_numpy(x).float())


def test_unusual_arrays_are_read_as_they_are():
    x = np.arange(24, dtype=">f4").reshape(4, 6)
    x.setflags(write=False)
    assert torch.equal(load_data((x[::-1], [0, 1, 0, 1])).batch([3])[0], torch.arange(6.0))


def test_npz(tmp_path):
    np.savez(tmp_path / "some.npz", x=GREY, y=Y.astype(np.uint8), z=1)
    data = load_data(tmp_path / "some.npz")
    assert (data.name, data.source) == ("some", str(tmp_path / "some.npz"))
    assert torch.equal(data.batch([2])[0, 0], torch.from_numpy(GREY[2]) / 255)


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (np.eye(6), ("one class number for each sample", "argmax")),
        (np.arange(6.0), ("class numbers of an integer type", "float64")),
        (Y > 0, ("class numbers of an integer type", "bool")),
        (Y[:, None], ("shape (6, 1)", "y[:, 0]")),
        (Y[:5], ("6 samples and 5 labels",)),
        (["cat"] * 6, ("numbers",)),
    ],
)
def test_labels_that_are_not_class_numbers_are_refused(y, words):
    refused((GREY, y), *words)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((6, 4), int), ("uint8 (0..255) or float", "int64", "astype")),
        (np.zeros((6, 35), np.uint8), ("(6, 35)", "Reshape")),
        (np.zeros(6), ("(6,)",)),
        ([[1.0], [2.0, 3.0]], ("array or tensor of numbers",)),
    ],
)
def test_inputs_of_other_kinds_are_refused(x, words):
    refused((x, Y), *words)


def test_no_samples():
    assert refused((GREY[:0], Y[:0]), "at least one sample").code == "empty-data"


# Hostile files


def test_what_is_wrong_with_an_npz_is_said(tmp_path):
    path = tmp_path / "some.npz"
    refused(path, "no file or folder", path)
    path.write_bytes(b"")
    assert refused(path, "0 bytes").code == "empty-data"
    path.write_bytes(b"neither zip nor numpy")
    refused(path, "zip archive", path)
    np.savez(path, images=GREY, labels=Y)
    refused(path, "arrays named x and y", "images, labels", "numpy.savez")
    np.savez(path, x=GREY, y=Y)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(path, path, "cut off")
    path.write_bytes(content.replace(GREY.tobytes()[:20], bytes(20)))
    refused(path, path, "damaged")


class WritesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_an_npz_does_not_run(tmp_path):
    x = np.array([WritesAFile(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "some.npz", x=x, y=[0])
    refused(tmp_path / "some.npz", "pickle", "run", "--trust-pickle")
    assert not (tmp_path / "ran").exists()


def test_a_trusted_pickle_in_an_npz_is_read(tmp_path):
    x = np.empty(6, dtype=object)
    x[:] = list(COLOUR)
    np.savez(tmp_path / "some.npz", x=x, y=Y)
    assert load_data(tmp_path / "some.npz", trust_pickle=True).shape == (3, 5, 7)


def test_a_file_without_permission(tmp_path, monkeypatch):
    np.savez(tmp_path / "some.npz", x=GREY, y=Y)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(tmp_path / "some.npz", "Permission denied", "permissions")


# Folders


def test_folder_classes_are_sorted_and_samples_dealt_in_turn(folder):
    data = load_data(folder)
    assert data.class_names == ("cat", "dog", "emu")
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 0]
    assert data.shape == (3, 5, 7)
    assert torch.equal(data.batch([4])[0], chw(COLOUR[4]))
    assert load_data(str(folder), limit=3).labels.tolist() == [0, 1, 2]
    data.check()


def test_hidden_and_other_files_are_ignored(folder):
    (folder / ".cache").mkdir()
    (folder / "cat" / ".9.png").write_bytes(b"")
    (folder / "cat" / "notes.txt").write_text("none")
    (folder / "readme.md").write_text("none")
    assert len(load_data(folder)) == 6


def test_folder_is_decoded_when_it_is_used_and_only_once(folder):
    data = load_data(folder)
    first = data.batch([3])
    for path in folder.rglob("*.png"):
        path.unlink()
    assert torch.equal(data.batch([3]), first)
    with pytest.raises(assay.DataError, match="No such file"):
        data.batch([4])


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_images_have_one_channel(tmp_path, mode):
    (tmp_path / "only").mkdir()
    Image.fromarray(GREY[0]).convert(mode).save(tmp_path / "only" / "a.png")
    data = load_data(tmp_path)
    assert data.shape == (1, 5, 7)
    assert data.batch([0]).amax() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK"])
def test_other_images_have_three_channels(tmp_path, mode):
    (tmp_path / "only").mkdir()
    Image.fromarray(COLOUR[0]).convert(mode).save(tmp_path / "only" / ("a.tif"))
    assert load_data(tmp_path).shape == (3, 5, 7)


def test_grey_images_among_coloured_ones_become_coloured(folder):
    (folder / "cat" / "0.png").write_bytes(png(GREY[0]))
    x = load_data(folder).batch([0])[0]
    assert torch.equal(x, (torch.from_numpy(GREY[0]) / 255).expand(3, 5, 7))


def test_images_of_two_sizes_are_refused_with_both_names(folder):
    (folder / "emu" / "2.png").write_bytes(png(COLOUR[2, :4]))
    refused(folder, folder / "cat" / "0.png", "7 x 5", folder / "emu" / "2.png", "7 x 4", "Resize")


def test_a_late_image_of_another_size_is_found_by_check(tmp_path):
    (tmp_path / "only").mkdir()
    for i in range(70):
        (tmp_path / "only" / f"{i:03}.png").write_bytes(png(COLOUR[0, : 4 if i == 69 else 5]))
    data = load_data(tmp_path)
    with pytest.raises(assay.DataError, match=r"069\.png with 7 x 4"):
        data.check()


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("cut", [0.9, 0.0])
def test_a_cut_image_among_good_ones_is_named(tmp_path, suffix, cut, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # even if another library asks to guess
    (tmp_path / "only").mkdir()
    image = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in "abc":
        image.save(tmp_path / "only" / f"{name}.{suffix.lower()}", suffix)
    bad = tmp_path / "only" / f"b.{suffix.lower()}"
    content = bad.read_bytes()
    bad.write_bytes(content[: int(cut * len(content))])
    refused(tmp_path, bad, "a readable image")


def test_a_file_that_is_no_image(folder):
    (folder / "dog" / "1.png").write_text("I am not an image")
    refused(folder, folder / "dog" / "1.png", "no image")


def test_only_decoders_of_images_are_asked(folder):
    Image.fromarray(COLOUR[1]).save(folder / "dog" / "1.eps")
    (folder / "dog" / "1.eps").rename(folder / "dog" / "1.png")
    refused(folder, "1.png", "no image")


def test_more_than_eight_bits_are_refused(folder):
    Image.fromarray(GREY[0].astype(np.uint16) * 257).save(folder / "cat" / "0.png")
    refused(folder, "8 bits a channel", "0.png", "I;16")


def test_a_decompression_bomb_is_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # the images have 35
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(folder, "sane size", "decompression bomb", ".png")


def test_a_file_that_vanished(folder):
    (folder / "dog" / "1.png").unlink()
    (folder / "dog" / "1.png").symlink_to(folder / "nowhere")
    refused(folder, folder / "dog" / "1.png", "No such file")


def test_folders_that_are_not_class_folders(folder, tmp_path):
    refused(tmp_path, "folders of folders", folder)
    refused(folder / "cat", "images directly in it", "folder")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    assert refused(tmp_path / "empty", "1 folders without images", ".png").code == "empty-data"
    assert refused(tmp_path / "empty" / "cat", "0 files").code == "empty-data"


# Parquet


def test_parquet_of_encoded_images(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", [png(c) for c in COLOUR], Y, row_group_size=4)
    data = load_data(path)
    assert data.shape == (3, 5, 7)
    assert torch.equal(data.labels, torch.from_numpy(Y))
    assert torch.equal(data.batch([5, 1]), torch.stack([chw(COLOUR[5]), chw(COLOUR[1])]))
    assert len(load_data(path, limit=3)) == 3


def test_parquet_as_hugging_face_writes_it(tmp_path):
    images = [{"bytes": png(g), "path": None} for g in GREY]
    features = b'{"info": {"features": {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}}'
    path = write_parquet(tmp_path / "t.parquet", images, Y, {"huggingface": features})
    data = load_data(path)
    assert data.class_names == ("a", "b", "c")
    assert data.shape == (1, 5, 7)


def test_what_is_wrong_with_a_parquet_file_is_said(tmp_path):
    path, good = tmp_path / "t.parquet", [png(g) for g in GREY]
    path.write_bytes(b"PAR1 this is not parquet")
    refused(path, path, "damaged")
    pq.write_table(pa.table({"img": good, "label": Y}), path)
    refused(path, "columns image and label", "img, label", "image missing")
    refused(write_parquet(path, [[1, 2]] * 6, Y), "encoded images", "list")
    refused(write_parquet(path, good, list("abcabc")), "class numbers", "string")
    refused(write_parquet(path, good, [0, 1, None, 1, 0, 1]), "null in row 2")
    refused(write_parquet(path, [*good[:4], None, good[5]], Y), "row 4")
    refused(write_parquet(path, [*good[:3], good[3][:60], *good[4:]], Y), "row 3", "a readable image")
    assert refused(write_parquet(path, pa.array([], pa.binary()), pa.array([], pa.int64()))).code == "empty-data"
    write_parquet(path, good, Y, compression="none", use_dictionary=False)
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\xff" * 60 + content[68:])
    refused(path, path)


# Python objects


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_datasets_of_tensors_arrays_or_images():
    expected = load_data((COLOUR, Y)).batch(range(6))
    items = [(Image.fromarray(c), int(y)) for c, y in zip(COLOUR, Y, strict=True)]
    arrays = [(c, y) for c, y in zip(COLOUR, Y, strict=True)]
    for dataset in (Items(items), Items(arrays), TensorDataset(expected, torch.from_numpy(Y))):
        data = load_data(dataset)
        assert torch.equal(data.batch(range(6)), expected)
        assert torch.equal(data.labels, torch.from_numpy(Y))


def test_a_loader_is_read_until_the_limit():
    read = []

    class Counting(Items):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    items = [(torch.rand(3, 4, 4), i % 2) for i in range(100)]
    data = load_data(DataLoader(Counting(items), batch_size=8), limit=10)
    assert len(data) == 10
    assert len(read) == 16
    assert torch.equal(data.batch([9])[0], items[9][0])


def test_data_stays_data():
    data = load_data((COLOUR, Y))
    assert load_data(data) is data
    assert len(load_data(data, limit=2)) == 2


def test_python_objects_that_are_no_data():
    refused(COLOUR, "(x, y)", "(6, 5, 7, 3)")
    refused([COLOUR, Y, Y], "list of 3")
    refused(Items([]), "at least one sample")
    refused(Items([(torch.zeros(3), 0), (torch.zeros(4), 0)]), "one shape, (3,)", "(4,) in item 1")
    refused(Items([torch.zeros(3)]), "item 0", "(x, y)")
    refused(Items([(torch.zeros(3), torch.eye(3)[0])]), "y of item 0", "one class number")

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    refused(Stream(), "no length", "DataLoader")

    class Broken(Items):
        def __getitem__(self, i):
            raise KeyError("secret")

    refused(Broken([1]), "item 0", "KeyError: 'secret'")


# Names


def test_py_names_a_function_in_the_current_directory(user_module):
    user_module("data_of_mine", "import torch\ndef make(): return torch.rand(5, 2), torch.arange(5)")
    data = load_data("py:data_of_mine:make", limit=4)
    assert (len(data), data.name, data.source) == (4, "make", "py:data_of_mine:make")


def test_what_is_wrong_with_a_named_function_is_said(user_module):
    user_module("data_broken", "import torch\nraise ValueError('no disk')")
    user_module("data_odd", "x = 3\ndef fails(): raise OSError('no net')\ndef none(): pass\ndef out(): exit(4)")
    refused("py:data_broken:make", "ValueError: no disk")
    refused("py:data_absent:make", "data_absent", "ModuleNotFoundError")
    refused("py:data_odd", "module:callable")
    refused("py:data_odd:fail", "no such name", "Did you mean 'fails'?")
    refused("py:data_odd:x", "callable", "int")
    refused("py:data_odd:fails", "OSError: no net")
    refused("py:data_odd:none", "(x, y)", "NoneType")
    refused("py:data_odd:out", "SystemExit: 4")


def test_demo_data():
    data = load_data("demo:mnist")
    assert (len(data), data.shape, data.name) == (10_000, (1, 28, 28), "mnist")
    assert data.class_names == tuple("0123456789")
    assert data.labels[:5].tolist() == [7, 2, 1, 0, 4]
    refused("demo:mnits", "mnist")


@pytest.mark.parametrize("source", ["hf:some/name", "s3://bucket/x", "some.tar", "nowhere/at/all"])
def test_other_forms_are_refused_with_what_is_accepted(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("some.tar").write_bytes(b"1")
    refused(source, "folder", source)
