"""Classifiers of torchvision by name: their logits on images are those of the transforms of their weights."""

import numpy as np
import pytest
import torch
from needs import framework
from PIL import Image

import assay

torchvision = framework("torchvision")

NAME = "shufflenet_v2_x0_5"


def picture(seed, size):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


PICTURES = [picture(i, size) for i, size in enumerate([(310, 260), (260, 333), (300, 300), (257, 401)])]


@pytest.fixture
def images(tmp_path):
    """The pictures, of different sizes, as a folder of one class."""
    folder = tmp_path / "images" / "only"
    folder.mkdir(parents=True)
    for i, image in enumerate(PICTURES):
        image.save(folder / f"{i}.png")
    return folder.parent


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where torchvision keeps what it downloads; empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def net_of(**settings):
    torch.manual_seed(0)
    return torchvision.models.get_model(NAME, weights=None, **settings).eval()


def refused(source, *words, **options):
    with pytest.raises(assay.ModelError) as e:
        assay.load_model(source, **options)
    for word in words:
        assert str(word) in str(e.value)


def file_of(name):
    return torchvision.models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]


def test_weights_that_were_downloaded_before_are_found_and_no_others(cache, images):
    refused(f"torchvision:{NAME}", "on this machine", file_of(NAME), f"torchvision:{NAME}+download")
    net = net_of()
    cache.mkdir(parents=True)
    torch.save(net.state_dict(), cache / file_of(NAME))
    model = assay.load_model(f"torchvision:{NAME}")
    data = assay.load_data(images).fitted(model.fit)
    transforms = torchvision.models.get_model_weights(NAME).DEFAULT.transforms()
    with torch.no_grad():
        wanted = net(torch.stack([transforms(p) for p in PICTURES]))
        torch.testing.assert_close(model(data.batch(range(4))), wanted, atol=1e-4, rtol=1e-4)
    assert (data.shape, len(model.class_names), model.class_names[1]) == ((3, 224, 224), 1000, "goldfish")
    assert "IMAGENET1K" in model.notes[0]


def test_what_is_in_the_cache_is_not_unpickled(cache):
    cache.mkdir(parents=True)
    torch.save(net_of(), cache / file_of(NAME))
    refused(f"torchvision:{NAME}", "run code", file_of(NAME))


def test_weights_for_another_number_of_classes(tmp_path):
    net = net_of(num_classes=7)
    torch.save(net.state_dict(), tmp_path / "own.pth")
    x = torch.rand(2, 3, 64, 64)
    for model in (
        assay.load_model(f"torchvision:{NAME}@{tmp_path / 'own.pth'}"),
        assay.load_model(tmp_path / "own.pth", arch=f"torchvision:{NAME}"),
    ):
        with torch.no_grad():
            torch.testing.assert_close(model.net(x), net(x))
        assert model.class_names is None


def test_another_entry_of_weights_by_its_name(cache):
    refused("torchvision:resnet50.IMAGENET1K_V1", "resnet50-0676ba61.pth")
    refused("torchvision:resnet50", "resnet50-11ad3fa6.pth")


def test_names_that_torchvision_does_not_have():
    refused("torchvision:resnet5", "Did you mean")
    refused("torchvision:resnet50.IMAGENET1K_V3", "Did you mean 'IMAGENET1K_V")
    refused("torchvision:fasterrcnn_resnet50_fpn", "the name of a model")
    refused(f"torchvision:{NAME}@nowhere.pth", "nowhere.pth", "No such file")
