"""Image classifiers of transformers: their logits on images are those of the library's own pipeline."""

import json

import numpy as np
import pytest
import torch
from needs import framework
from PIL import Image

import assay
from assay.data import Fit
from assay.models.loaders.hugging_face import understood

transformers = framework("transformers")

NAMES = ("cat", "dog", "emu")


def picture(seed, size):
    """A smooth coloured image: resizing has something to do, and rounding has little to spoil."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


PICTURES = [picture(i, size) for i, size in enumerate([(61, 40), (40, 61), (50, 50), (33, 47)])]


@pytest.fixture
def images(tmp_path):
    """The pictures, of different sizes, as a folder of one class."""
    folder = tmp_path / "images" / "only"
    folder.mkdir(parents=True)
    for i, image in enumerate(PICTURES):
        image.save(folder / f"{i}.png")
    return folder.parent


def labels():
    return {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}


def vit(size=16):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=size, patch_size=8, **small, **labels())
    return transformers.ViTForImageClassification(config).eval()


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], **labels())
    return transformers.ResNetForImageClassification(config).eval()


PROCESSORS = {
    "both sides": ("ViTImageProcessor", {"size": {"height": 16, "width": 16}}),
    "a number": ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "resample": 3}),
    "no normalisation": ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "do_normalize": False}),
    "not scaled to one": ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "do_rescale": False}),
    "the shorter side": ("CLIPImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": 16}),
    "stretched and cropped": (
        "DeiTImageProcessor",
        {"size": {"height": 24, "width": 20}, "crop_size": {"height": 16, "width": 16}},
    ),
    "a share": ("ConvNextImageProcessor", {"size": {"shortest_edge": 16}, "crop_pct": 0.8}),
    "a little more": ("LevitImageProcessor", {"size": {"shortest_edge": 16}, "crop_size": 16}),
    "an offset": (
        "EfficientNetImageProcessor",
        {"size": {"height": 16, "width": 16}, "rescale_factor": 1 / 127.5, "rescale_offset": True},
    ),
    "blue first": (
        "MobileViTImageProcessor",
        {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}},
    ),
}


@pytest.mark.parametrize("way", PROCESSORS)
def test_logits_on_images_are_those_of_the_librarys_own_pipeline(tmp_path, images, way):
    torch.manual_seed(0)
    net = vit()
    kind, settings = PROCESSORS[way]
    processor = getattr(transformers, f"{kind}Pil")(**settings)
    for part in (net, processor):
        part.save_pretrained(tmp_path / "model")
    seen = processor(PICTURES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = net(pixel_values=seen).logits
    model = assay.load_model(f"hf:{tmp_path / 'model'}")
    data = assay.load_data(images).fitted(model.fit)
    x = data.batch(range(4))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (model.mean, model.std))
    ours = (x - mean) / std
    torch.testing.assert_close(ours.flip(1) if way == "blue first" else ours, seen, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)
    assert (model.name, model.class_names, data.shape) == ("model", NAMES, (3, 16, 16))


def saved(folder, net=None, processor=None):
    """Save a network and its processor, as their authors do."""
    (net or vit()).save_pretrained(folder)
    (processor or transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})).save_pretrained(folder)
    return folder


def refused(source, *words, **options):
    with pytest.raises(assay.ModelError) as e:
        assay.load_model(source, **options)
    for word in words:
        assert str(word) in str(e.value)


def test_the_default_pipeline_resizes_a_little_otherwise(tmp_path, images):
    """The library resizes by torchvision where it is there: levels of 8 bits then differ by one or two."""
    torch.manual_seed(0)
    folder = saved(tmp_path / "model")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    seen = processor(PICTURES, return_tensors="pt")["pixel_values"]
    model = assay.load_model(f"hf:{folder}")
    x = assay.load_data(images).fitted(model.fit).batch(range(4))
    assert ((x - 0.5) / 0.5 - seen).abs().max() < 2.5 / 127.5


def test_gradients_and_the_verdict(tmp_path, images):
    torch.manual_seed(0)
    net = resnet()
    processor = transformers.ConvNextImageProcessorPil(size={"shortest_edge": 16})
    model = assay.load_model(f"hf:{saved(tmp_path / 'model', net, processor)}")
    data = assay.load_data(images).fitted(model.fit)
    x = data.batch(range(4))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (model.mean, model.std))
    (g,) = torch.autograd.grad(model(a).square().sum(), a)
    (h,) = torch.autograd.grad(net(pixel_values=(b - mean) / std).logits.square().sum(), b)
    torch.testing.assert_close(g, h, atol=1e-5, rtol=1e-4)
    verdict = assay.evaluate(model, data, "linf:1/255", effort="quick", progress=False)
    assert verdict.n == 4


def test_weights_of_ones_own_for_another_number_of_classes(tmp_path):
    torch.manual_seed(0)
    folder = saved(tmp_path / "model")
    other = vit()
    other.classifier = torch.nn.Linear(16, 7)
    torch.save(other.state_dict(), tmp_path / "own.pth")
    x = torch.rand(2, 3, 16, 16)
    for model in (
        assay.load_model(f"hf:{folder}@{tmp_path / 'own.pth'}", mean=0, std=1),
        assay.load_model(tmp_path / "own.pth", arch=f"hf:{folder}"),
    ):
        torch.testing.assert_close(getattr(model.net(x), "logits", model.net(x)), other(pixel_values=x).logits)
        assert model.class_names is None


def test_pickled_weights_are_read_only_if_trusted(tmp_path):
    folder = saved(tmp_path / "model")
    state = vit().state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    refused(f"hf:{folder}", "safetensors", "--trust-pickle")
    assert assay.load_model(f"hf:{folder}", trust_pickle=True)(torch.rand(2, 3, 16, 16)).shape == (2, 3)


def test_a_network_without_its_head_is_refused(tmp_path):
    torch.manual_seed(0)
    net = vit()
    folder = saved(tmp_path / "model", net)
    net.vit.save_pretrained(folder)
    config = transformers.ViTConfig.from_pretrained(folder)
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(folder)
    refused(f"hf:{folder}", "without classifier.bias, classifier.weight")


def test_code_of_a_repository_is_not_run(tmp_path):
    folder = saved(tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    refused(f"hf:{folder}", folder)
    assert not ran.exists()


def test_names_are_looked_up_on_this_machine_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("hf:nobody/nothing-of-this-name", "on this machine", "hf:nobody/nothing-of-this-name+download")


def test_without_a_processor_nothing_is_assumed_and_that_is_said(tmp_path):
    vit().save_pretrained(tmp_path / "model")
    model = assay.load_model(f"hf:{tmp_path / 'model'}")
    assert (model.mean, model.std, model.fit) == (None, None, None)
    assert "preprocessor_config.json" in model.notes[0]


def test_a_processor_that_is_not_understood_is_named():
    with pytest.raises(assay.ModelError, match="DonutImageProcessor of mine"):
        understood({"image_processor_type": "DonutImageProcessorFast"}, "mine")
    with pytest.raises(assay.ModelError, match=r"one size; found CLIPImageProcessor with .*'size': 224"):
        understood({"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": 224}, "mine")


@pytest.mark.parametrize("wrong", [{"size": {"height": 10**9, "width": 8}}, {"image_mean": "much"}, {"resample": 77}])
def test_settings_that_make_no_sense_are_refused(tmp_path, wrong):
    folder = saved(tmp_path / "model")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    refused(f"hf:{folder}", "")


@pytest.mark.parametrize(
    ("size", "fit"),
    [
        (224, Fit(8, 8, 224, "bilinear", 3, floor=True)),
        ({"shortest_edge": 224}, Fit(8, 8, 224, "bilinear", 3, floor=True)),
        ([20, 24], Fit(8, 8, 0, "bilinear", 3, floor=True, stretch=(20, 24))),
        ({"height": 20, "width": 24}, Fit(8, 8, 0, "bilinear", 3, floor=True, stretch=(20, 24))),
    ],
)
def test_the_forms_that_sizes_have_had(size, fit):
    crop = {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}
    settings = {"image_processor_type": "ViTImageProcessor"}
    assert understood(settings | crop | {"do_resize": True, "size": size, "resample": 2}, "mine").fit == fit


def test_a_timm_network_in_transformers_form(tmp_path):
    timm = framework("timm")
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=3).eval()
    timm.models.save_for_hf(net, tmp_path / "model", safe_serialization="both")
    model = assay.load_model(f"hf:{tmp_path / 'model'}")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.net(x), net(x))
    assert model.fit is not None
