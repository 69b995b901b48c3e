"""Networks of timm by name: their logits on images are those of timm's own pipeline; nothing is downloaded unasked."""

import json

import numpy as np
import pytest
import torch
from needs import framework
from PIL import Image
from safetensors.torch import save_file

import assay
from assay.models.loaders.timm_models import fit_of

timm = framework("timm")


def picture(seed, size):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


PICTURES = [picture(i, size) for i, size in enumerate([(210, 180), (180, 215), (200, 200), (161, 301)])]


@pytest.fixture
def images(tmp_path):
    """The pictures, of different sizes, as a folder of one class."""
    folder = tmp_path / "images" / "only"
    folder.mkdir(parents=True)
    for i, image in enumerate(PICTURES):
        image.save(folder / f"{i}.png")
    return folder.parent


def net_of(name="test_resnet", **settings):
    torch.manual_seed(0)
    return timm.create_model(name, **settings).eval()


def refused(source, *words, **options):
    with pytest.raises(assay.ModelError) as e:
        assay.load_model(source, **options)
    for word in words:
        assert str(word) in str(e.value)


def pipeline(net):
    """What timm itself makes of the pictures."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)
    with torch.no_grad():
        return net(torch.stack([transform(p) for p in PICTURES]))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_logits_on_images_are_those_of_timms_own_pipeline(tmp_path, images, name):
    net = net_of(name)
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    model = assay.load_model(f"timm:{name}@{tmp_path / 'own.safetensors'}")
    data = assay.load_data(images).fitted(model.fit)
    with torch.no_grad():
        torch.testing.assert_close(model(data.batch(range(4))), pipeline(net), atol=1e-4, rtol=1e-4)
    assert (data.shape, model.name) == ((3, 160, 160), name)
    assert "--size, --mean and --std" in model.notes[0]


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize(("size", "share"), [((3, 32, 32), 0.875), ((3, 24, 40), 1.0), ((1, 20, 20), 0.9)])
def test_the_ways_in_which_timm_crops(mode, size, share):
    config = {"input_size": size, "crop_pct": share, "crop_mode": mode, "interpolation": "bilinear"}
    fit = fit_of(config)
    if mode == "center" and size[1] != size[2]:
        assert fit is None
        return
    transform = timm.data.create_transform(**config, mean=(0.0,), std=(1.0,), is_training=False)
    for image in (p.convert("L" if size[0] == 1 else "RGB") for p in PICTURES):
        found = torch.from_numpy(np.array(fit(image))).reshape(*size[1:], size[0]).permute(2, 0, 1) / 255
        torch.testing.assert_close(found, transform(image))


def test_weights_for_another_number_of_classes(tmp_path):
    net = net_of(num_classes=7)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "own.pth")
    x = torch.rand(2, 3, 64, 64)
    for model in (
        assay.load_model(f"timm:test_resnet@{tmp_path / 'own.pth'}"),
        assay.load_model(tmp_path / "own.pth", arch="timm:test_resnet"),
    ):
        with torch.no_grad():
            torch.testing.assert_close(model.net(x), net(x))
        assert model.class_names is None


def test_a_folder_of_timm_with_its_own_classes_and_normalisation(tmp_path, images):
    net = net_of(num_classes=3)
    net.pretrained_cfg = net.pretrained_cfg | {
        "mean": (0.1, 0.2, 0.3),
        "std": (0.5, 0.6, 0.7),
        "input_size": (3, 48, 48),
    }
    config = {"label_names": ["cat", "dog", "emu"]}
    timm.models.save_for_hf(net, tmp_path / "mine", config, safe_serialization=True)
    model = assay.load_model(f"timm:{tmp_path / 'mine'}")
    assert (model.mean, model.name, model.class_names) == ((0.1, 0.2, 0.3), "mine", ("cat", "dog", "emu"))
    data = assay.load_data(images).fitted(model.fit)
    assert data.shape == (3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(data.batch(range(4))), pipeline(net), atol=1e-4, rtol=1e-4)
    verdict = assay.evaluate(model, data, "linf:1/255", effort="quick", progress=False)
    assert verdict.n == 4


@pytest.mark.parametrize("wrong", [{"input_size": [3, 10**9, 10**9]}, {"input_size": 4}, {"crop_pct": "much"}])
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path, wrong):
    net = net_of(num_classes=3)
    timm.models.save_for_hf(net, tmp_path / "mine", safe_serialization=True)
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    config["pretrained_cfg"] |= wrong
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    refused(f"timm:{tmp_path / 'mine'}", "mine")


def test_weights_that_were_downloaded_before_are_found_and_no_others(tmp_path, monkeypatch):
    """A cache as huggingface_hub keeps it; without one, what would fetch the weights is said."""
    hub = framework("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cache = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k"
    refused("timm:test_resnet", "on this machine", "timm:test_resnet+download", "timm:test_resnet@")
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc").mkdir(parents=True)
    net = net_of()
    save_file(net.state_dict(), cache / "snapshots" / "abc" / "model.safetensors")
    model = assay.load_model("timm:test_resnet")
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.net(x), net(x))
    assert len(model.class_names) == 1000
    assert "goldfish" in model.class_names[1]


def test_names_that_timm_does_not_have():
    refused("timm:test_resnett", "Did you mean 'test_resnet'?")
    refused("timm:test_resnet.r160_in2k", "r160_in1k")
    refused("timm:test_resnet@nowhere.pth", "nowhere.pth", "No such file")
