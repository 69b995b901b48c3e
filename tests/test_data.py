"""What can be given as data, what becomes of it, and what is refused in which words."""

import io
import pickle
import sys
import tarfile
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
from assay.core.errors import DataError
from assay.data import Data, Fit, load_data
from assay.data.shards import expanded

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


def test_npz_with_the_names_of_the_classes(tmp_path):
    np.savez(tmp_path / "some.npz", x=GREY, y=Y, class_names=["cat", "dog", "emu"])
    assert load_data(tmp_path / "some.npz").class_names == ("cat", "dog", "emu")


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


# Sizes


WIDE = Image.fromarray(RNG.integers(0, 256, (30, 61, 3), dtype=np.uint8))


@pytest.fixture
def mixed(tmp_path):
    """Three images of three sizes in one class."""
    (tmp_path / "mixed" / "only").mkdir(parents=True)
    for name, size in {"a": (61, 30), "b": (24, 40), "c": (33, 33)}.items():
        WIDE.resize(size).save(tmp_path / "mixed" / "only" / f"{name}.png")
    return tmp_path / "mixed"


def bytes_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def test_images_of_any_size_are_scaled_by_the_shorter_side_and_cropped(mixed):
    data = load_data(mixed).fitted(Fit(16, 16, shorter=20, filter="bilinear"))
    assert (len(data), data.shape) == (3, (3, 16, 16))
    scaled = WIDE.resize((40, 20), Image.Resampling.BILINEAR)  # 61 x 30 -> 40.67 x 20
    assert torch.equal(data.batch([0])[0], bytes_of(scaled.crop((12, 2, 28, 18))))
    data.check()


def test_both_sides_are_scaled_where_the_shorter_one_is_not_given(mixed):
    data = load_data(mixed).fitted(Fit(8, 12, filter="lanczos"))
    assert torch.equal(data.batch([0])[0], bytes_of(WIDE.resize((12, 8), Image.Resampling.LANCZOS)))


def test_stretched_and_cropped(mixed):
    data = load_data(mixed).fitted(Fit(8, 8, stretch=(10, 12)))
    assert torch.equal(
        data.batch([0])[0], bytes_of(WIDE.resize((12, 10), Image.Resampling.BICUBIC).crop((2, 1, 10, 9)))
    )


def test_where_the_centre_lies_between_two_pixels():
    """A row of 9 pixels, of which 6 remain: torchvision begins at round(1.5) = 2, transformers at floor(1.5) = 1."""
    row = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 9))
    assert np.array(Fit(2, 6, shorter=2)(row))[0].tolist() == [2, 3, 4, 5, 6, 7]
    assert np.array(Fit(2, 6, shorter=2, floor=True)(row))[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert np.array(Fit(2, 11, shorter=2)(row))[0].tolist() == [0, *range(9), 0]  # black around


def test_size_is_a_square_that_keeps_proportions_or_both_sides(mixed):
    assert load_data(mixed, size=16).shape == (3, 16, 16)
    wide = bytes_of(WIDE.resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16)))
    assert torch.equal(load_data(mixed, size=16).batch([0])[0], wide)
    assert load_data(mixed, size=(10, 12)).shape == (3, 10, 12)
    refused(mixed, "sides from 1", size=0)


def test_eight_bit_arrays_are_resized_as_files_are(mixed):
    files = load_data(mixed, limit=1, size=16)
    array = load_data((np.array(WIDE)[None], [0]), size=16)
    assert torch.equal(array.batch([0]), files.batch([0]))
    assert array.head(1).shape == (3, 16, 16)


def test_floats_are_never_resized():
    x = torch.rand(4, 3, 20, 20)
    data = load_data((x, [0, 1, 0, 1]))
    assert torch.equal(data.fitted(Fit(20, 20)).batch([2])[0], x[2])
    with pytest.raises(assay.DataError, match=r"16 x 16.*float32 samples of shape \(3, 20, 20\).*size=20"):
        data.fitted(Fit(16, 16))
    last = load_data((torch.rand(4, 16, 16, 3), [0, 1, 0, 1]))
    assert last.fitted(Fit(16, 16)).shape == (16, 16, 3)
    vectors = load_data((torch.rand(4, 7), [0, 1, 0, 1]))
    assert vectors.fitted(Fit(16, 16)).shape == (7,)


def test_a_size_that_was_asked_for_stands_whatever_the_model_takes():
    data = load_data((torch.rand(4, 3, 20, 20), [0, 1, 0, 1]), size=20)
    assert data.fitted(Fit(224, 224, 256)).shape == (3, 20, 20)
    assert data.fitted(None) is data


def test_a_fit_can_say_how_many_channels_there_are(mixed):
    assert load_data(mixed).fitted(Fit(8, 8, channels=1)).batch([0]).shape == (1, 1, 8, 8)
    grey = load_data((GREY, Y)).fitted(Fit(5, 7, channels=3)).batch([0])[0]
    assert torch.equal(grey, (torch.from_numpy(GREY[0]) / 255).expand(3, 5, 7))


def test_the_fit_is_part_of_the_fingerprint_and_stays_with_parts_of_the_data(mixed):
    data = load_data(mixed)
    prints = [data.fitted(Fit(8, 8, s)).fingerprint() for s in (0, 8, 9)] + [
        data.fitted(Fit(8, 8, 8, "bilinear")).fingerprint()
    ]
    assert len({*prints}) == 4
    fitted = data.fitted(Fit(8, 8, 8))
    assert fitted.fingerprint() == prints[1]
    assert fitted.head(2).shape == fitted.scaled(-1, 1).shape == fitted.take([0]).shape == (3, 8, 8)
    assert fitted.scaled(-1, 1).batch([0]).amin() < 0
    assert fitted.held().fingerprint() == prints[1]


def test_a_thin_image_does_not_fill_the_memory(tmp_path):
    (tmp_path / "only").mkdir()
    Image.new("L", (60_000, 1)).save(tmp_path / "only" / "a.png")
    with pytest.raises(assay.DataError, match="sane proportions"):
        load_data(tmp_path, size=224).check()


def test_fits_that_are_none():
    for wrong in ({"height": 0}, {"width": -1}, {"shorter": 10**9}, {"filter": "best"}, {"channels": 2}):
        with pytest.raises(assay.DataError, match="sides from 1") as e:
            Fit(**{"height": 8, "width": 8} | wrong)
        assert str(next(iter(wrong.values()))) in e.value.found
        assert "Fit(" not in e.value.found


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
    refused(folder, folder / "cat" / "0.png", "7 x 5", folder / "emu" / "2.png", "7 x 4", "--size 224", "size=224")
    assert "different sizes" in repr(load_data(folder))


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
    pq.write_table(pa.table({"photo": good, "label": Y}), path)
    refused(path, "columns image and label", "photo, label", "image missing")
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


def test_other_names_of_columns_that_are_common(tmp_path):
    table = pa.table({"img": [png(c) for c in COLOUR], "fine_label": Y, "coarse_label": Y // 2})
    pq.write_table(table, tmp_path / "t.parquet")
    assert torch.equal(load_data(tmp_path / "t.parquet").labels, torch.from_numpy(Y))
    features = b'{"info": {"features": {"photo": {"_type": "Image"}, "kind": {"names": ["a"], "_type": "ClassLabel"}}}}'
    table = pa.table({"photo": [png(c) for c in COLOUR], "kind": Y, "n": Y})
    pq.write_table(table.replace_schema_metadata({"huggingface": features}), tmp_path / "t.parquet")
    data = load_data(tmp_path / "t.parquet")
    assert (data.shape, data.class_names) == ((3, 5, 7), ("a",))


# Folders of Hugging Face, without their library (with it: frameworks/test_data_forms.py)


def test_hf_takes_the_split_that_is_held_out_or_named(tmp_path):
    for name, rows in {"train-00000-of-00002": [0, 1], "train-00001-of-00002": [2], "test-00000-of-00001": [3]}.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        write_parquet(tmp_path / "data" / f"{name}.parquet", [png(COLOUR[r]) for r in rows], Y[rows], row_group_size=1)
    assert torch.equal(load_data(f"hf:{tmp_path}").batch([0])[0], chw(COLOUR[3]))
    train = load_data(f"hf:{tmp_path}:train")
    assert torch.equal(train.batch([2, 0]), torch.stack([chw(COLOUR[2]), chw(COLOUR[0])]))
    assert train.source == f"hf:{tmp_path}:train"
    refused(f"hf:{tmp_path}:trian", "a split", "Did you mean 'train'?")
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [png(COLOUR[0])[:50]], [0])
    refused(f"hf:{tmp_path}:train", "row 0", "train-00001-of-00002.parquet")


def test_hf_with_class_folders_for_each_split(folder, tmp_path):
    (tmp_path / "set" / "validation" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "validation" / "cat" / "a.png").write_bytes(png(COLOUR[0]))
    folder.rename(tmp_path / "set" / "train")
    assert len(load_data(f"hf:{tmp_path / 'set'}")) == 1
    assert load_data(f"hf:{tmp_path / 'set'}:train").class_names == ("cat", "dog", "emu")


def test_hf_names_files_in_its_folder_only(tmp_path):
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}], "_split": "test"}')
    refused(f"hf:{tmp_path}", "names of files", "passwd")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}], "_split": "test"}')
    refused(f"hf:{tmp_path}", "Arrow", "data.arrow")
    (tmp_path / "data.arrow").write_bytes(b"neither this nor that" * 10)
    refused(f"hf:{tmp_path}", "Arrow", "data.arrow")
    (tmp_path / "state.json").write_text("[]")
    refused(f"hf:{tmp_path}", "_split", "state.json")


def test_records_of_tensorflow_are_refused_with_a_way_round(tmp_path):
    (tmp_path / "mnist-test.tfrecord-00000-of-00001").write_bytes(b"1")
    refused(tmp_path, "TensorFlow Datasets", ".parquet")


# Shards


def write_shard(path, samples):
    """Write a tar file: a name and the members of each sample."""
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for kind, content in members.items():
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def test_shards_of_webdataset(tmp_path):
    for shard, rows in {"000": (0, 1), "001": (2, 3), "002": (4,)}.items():
        samples = [(f"a/{r:04}", {"png": png(COLOUR[r]), "cls": str(Y[r]).encode()}) for r in rows]
        write_shard(tmp_path / f"val-{shard}.tar", samples)
    data = load_data(f"{tmp_path}/val-{{000..002}}.tar")
    assert (len(data), data.shape, data.class_names) == (5, (3, 5, 7), None)
    assert torch.equal(data.labels, torch.from_numpy(Y[:5]))
    assert torch.equal(data.batch([4, 1]), torch.stack([chw(COLOUR[4]), chw(COLOUR[1])]))
    (tmp_path / "classnames.txt").write_text("cat\ndog\nemu\n")
    assert load_data(tmp_path / "val-001.tar", limit=1).class_names == ("cat", "dog", "emu")
    refused(f"{tmp_path}/val-{{000..003}}.tar", "no file")


def test_shards_with_labels_in_json(tmp_path):
    members = {"JPG": png(COLOUR[0]), "json": b'{"label": 2, "url": "x"}', "txt": b"a caption"}
    assert load_data(write_shard(tmp_path / "a.tar", [("0", members)])).labels.tolist() == [2]


def test_what_is_wrong_with_a_shard_is_said(tmp_path):
    path, good = tmp_path / "a.tar", png(COLOUR[0])
    path.write_bytes(b"")
    refused(path, "0 bytes")
    path.write_bytes(b"neither tar nor this" * 100)
    refused(path, path, ".tar")
    refused(write_shard(path, [("0", {"png": good, "pyd": pickle.dumps(3)})]), "png, pyd of 0", "not read")
    refused(write_shard(path, [("0", {"png": good, "cls": b"cat"})]), "class number", "cat")
    refused(write_shard(path, [("0", {"png": good, "json": b"{"})]), "json", "0 in")
    refused(write_shard(path, [("0", {"a.png": good, "b.png": good, "cls": b"1"})]), "one image", "a.png, b.png")
    refused(write_shard(path, [("0", {"png": good[:60], "cls": b"1"})]), "a readable image", "0 in")
    refused(write_shard(path, []), "at least one sample")
    samples = [(str(i), {"png": good, "cls": b"1"}) for i in range(9)]
    content = write_shard(path, samples).read_bytes()
    path.write_bytes(content[:5000] + b"\xff" * 600 + content[5600:])
    refused(path, path)


def test_names_of_shards_with_braces():
    assert expanded("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expanded("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expanded("plain.tar") == ["plain.tar"]


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


def test_datasets_of_images_may_have_different_sizes():
    items = [(WIDE, 0), (WIDE.resize((20, 40)), 1), (WIDE.convert("L"), 1)]
    data = load_data(Items(items))
    refused(Items(items), "61 x 30", "item 1", "20 x 40")
    assert torch.equal(
        data.fitted(Fit(16, 16)).batch([0])[0], bytes_of(WIDE.resize((16, 16), Image.Resampling.BICUBIC))
    )
    refused(Items([(WIDE, 0), (torch.zeros(3, 4, 4), 1)]), "item 1", "one Tensor")


def test_class_names_of_datasets_and_of_what_wraps_them():
    dataset = Items([(torch.rand(3, 4, 4), i % 2) for i in range(6)])
    dataset.classes = ["cat", "dog"]
    for wrapped in (dataset, torch.utils.data.Subset(dataset, [0, 3]), DataLoader(dataset, batch_size=2)):
        assert load_data(wrapped).class_names == ("cat", "dog")


def test_batches_and_items_that_are_mappings():
    items = [{"pixel_values": torch.rand(3, 4, 4), "labels": i % 2, "id": i} for i in range(6)]
    for source in (Items(items), DataLoader(Items(items), batch_size=4)):
        data = load_data(source)
        assert torch.equal(data.batch([3])[0], items[3]["pixel_values"])
        assert data.labels.tolist() == [0, 1] * 3
    refused(Items([{"photo": WIDE, "label": 1}]), "photo, label as item 0", "Rename")


def test_what_is_too_large_for_the_memory_is_refused_before_it_fills_it(monkeypatch):
    monkeypatch.setattr("assay.data.objects._MOST", 1000)
    items = [(torch.rand(3, 8, 8), 0)] * 10
    refused(Items(items), "into memory", "limit")
    assert len(load_data(Items(items), limit=1)) == 1


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


@pytest.mark.parametrize("source", ["hf:some/name", "nowhere://bucket/x", "some.zip", "nowhere/at/all"])
def test_other_forms_are_refused_with_what_is_accepted(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("some.zip").write_bytes(b"1")
    refused(source, "folder", source.removeprefix("hf:"))


def test_labels_that_are_names_are_refused_with_the_way_out():
    with pytest.raises(DataError, match=r"numpy\.unique"):
        load_data((np.zeros((2, 3), np.float32), np.array(["cat", "dog"])))


def test_fewer_names_than_classes_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 2), np.float32), y=np.arange(3), class_names=["a", "b"])
    with pytest.raises(DataError, match="2 names, and label 2"):
        load_data(tmp_path / "d.npz")
