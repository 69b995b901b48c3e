"""Data as other libraries write and hold it: Hugging Face's datasets, WebDataset, torchvision's datasets."""

import numpy as np
import pytest
import torch
from needs import framework
from PIL import Image
from torch.utils.data import DataLoader

import assay
from assay.data import Fit

NAMES = ["cat", "dog", "emu"]
COLOUR = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
Y = [0, 1, 2, 0, 1, 2, 0]
X = torch.from_numpy(COLOUR).permute(0, 3, 1, 2) / 255


def holds(data, rows=range(7), names=NAMES):
    """The data are the samples of these rows."""
    torch.testing.assert_close(data.batch(range(len(rows))), X[list(rows)], rtol=0, atol=0)
    assert data.labels.tolist() == [Y[r] for r in rows]
    assert data.class_names == (None if names is None else tuple(names))
    return True


@pytest.fixture
def table():
    """The samples as a data set of Hugging Face."""
    datasets = framework("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    images = [Image.fromarray(c) for c in COLOUR]
    return datasets.Dataset.from_dict({"image": images, "label": Y}, features=features)


# Hugging Face


def test_what_save_to_disk_wrote(tmp_path, table):
    table.save_to_disk(tmp_path / "one", num_shards=3)
    data = assay.load_data(f"hf:{tmp_path / 'one'}")
    assert holds(data)
    assert data.name == "one"
    assert holds(assay.load_data(f"hf:{tmp_path / 'one'}", limit=2), range(2))
    table.select([4, 1]).save_to_disk(tmp_path / "some")
    assert holds(assay.load_data(f"hf:{tmp_path / 'some'}"), [4, 1])


def test_splits_that_save_to_disk_wrote(tmp_path, table):
    datasets = framework("datasets")
    splits = {"train": table.select(range(5)), "test": table.select([5, 6])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "all")
    assert holds(assay.load_data(f"hf:{tmp_path / 'all'}"), [5, 6])
    assert holds(assay.load_data(f"hf:{tmp_path / 'all'}:train"), range(5))
    with pytest.raises(assay.DataError, match="Known: test, train"):
        assay.load_data(f"hf:{tmp_path / 'all'}:val")


def test_parquet_files(tmp_path, table):
    (tmp_path / "data").mkdir()
    table.select(range(4)).to_parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
    table.select(range(4, 7)).to_parquet(tmp_path / "data" / "train-00001-of-00002.parquet")
    assert holds(assay.load_data(f"hf:{tmp_path}:train"))
    assert holds(assay.load_data(tmp_path / "data" / "train-00001-of-00002.parquet"), range(4, 7))


def test_a_folder_of_images_as_the_library_sees_it(tmp_path):
    datasets = framework("datasets")
    for split in ("train", "test"):
        for i, y in enumerate(Y):
            folder = tmp_path / split / NAMES[y]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(COLOUR[i]).save(folder / f"{i}.png")
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="test", cache_dir=str(tmp_path / "c"))
    data = assay.load_data(f"hf:{tmp_path}")
    assert data.class_names == tuple(theirs.features["label"].names)
    assert sorted(data.labels.tolist()) == sorted(theirs["label"])


def test_a_live_data_set(table):
    assert holds(assay.load_data(table))
    assert holds(assay.load_data(table.select([3, 2])), [3, 2])
    assert holds(assay.load_data(table.with_format("torch")))
    with pytest.raises(assay.DataError, match="Choose one of train, test"):
        assay.load_data(framework("datasets").DatasetDict({"train": table, "test": table}))


def test_images_of_different_sizes_in_a_live_data_set():
    datasets = framework("datasets")
    images = [Image.fromarray(COLOUR[0]), Image.fromarray(COLOUR[1]).resize((20, 30))]
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}).cast_column("image", datasets.Image())
    assert assay.load_data(table).fitted(Fit(5, 6)).shape == (3, 5, 6)


# WebDataset


def test_shards_as_the_library_writes_them(tmp_path):
    webdataset = framework("webdataset")
    with webdataset.ShardWriter(f"{tmp_path}/val-%06d.tar", maxcount=3, verbose=0) as sink:
        for i, y in enumerate(Y):
            sink.write({"__key__": f"{i:06}", "png": Image.fromarray(COLOUR[i]), "cls": y, "json": {"url": "x"}})
    (tmp_path / "classnames.txt").write_text("\n".join(NAMES))
    data = assay.load_data(f"{tmp_path}/val-{{000000..000002}}.tar")
    assert holds(data)
    theirs = webdataset.WebDataset(f"{tmp_path}/val-{{000000..000002}}.tar", shardshuffle=False).decode("pil")
    seen = [(np.array(image), label) for image, label in theirs.to_tuple("png", "cls")]
    assert [label for _, label in seen] == data.labels.tolist()
    np.testing.assert_array_equal(seen[6][0], COLOUR[6])


def test_a_loader_of_shards(tmp_path):
    webdataset = framework("webdataset")
    with webdataset.TarWriter(f"{tmp_path}/a.tar") as sink:
        for i, y in enumerate(Y):
            sink.write({"__key__": f"{i:06}", "png": Image.fromarray(COLOUR[i]), "cls": y})
    stream = webdataset.WebDataset(f"{tmp_path}/a.tar", shardshuffle=False).decode("torchrgb").to_tuple("png", "cls")
    assert holds(assay.load_data(DataLoader(stream, batch_size=3)), names=None)


# torchvision


def test_data_sets_of_torchvision_as_they_are(tmp_path):
    torchvision = framework("torchvision")
    for i, y in enumerate(Y):
        folder = tmp_path / NAMES[y]
        folder.mkdir(exist_ok=True)
        Image.fromarray(COLOUR[i]).resize((6 + y, 5)).save(folder / f"{i}.png")
    plain = torchvision.datasets.ImageFolder(tmp_path)
    assert assay.load_data(plain).fitted(Fit(8, 8)).shape == (3, 8, 8)
    transforms = torchvision.transforms.Compose(
        [torchvision.transforms.Resize((5, 6)), torchvision.transforms.ToTensor()]
    )
    dataset = torchvision.datasets.ImageFolder(tmp_path, transforms)
    for source in (dataset, DataLoader(dataset, batch_size=2), torch.utils.data.Subset(dataset, range(7))):
        data = assay.load_data(source)
        assert (data.shape, data.class_names) == ((3, 5, 6), tuple(NAMES))
        assert data.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_fake_data_with_random_transforms_are_drawn_once():
    torchvision = framework("torchvision")
    dataset = torchvision.datasets.FakeData(5, (3, 12, 12), 4, torchvision.transforms.RandomCrop(8))
    data = assay.load_data(dataset)
    assert data.shape == (3, 8, 8)
    assert torch.equal(data.batch([3]), data.batch([3]))
