import pytest
import torch
from torch import nn

import fastentropy as fe
from fastentropy.recipes.cifar10_models import MODELS, resnet8, swin_t

#: Activations of each network, as in EASIER's tables, and the kind.
ACTIVATIONS = {
    "resnet18": (17, "relu"),
    "resnet18_wide_map": (17, "relu"),
    "mobilenet_v2": (35, "relu6"),
    "vgg16_bn": (15, "relu"),
    "swin_t": (12, "gelu"),
    "resnet8": (7, "relu"),
}
#: Height and width of the last map before it is pooled or flattened, and the module that makes it.
LAST_MAPS = {
    "resnet18": ("layer4", 2),
    "resnet18_wide_map": ("layer4", 4),
    "mobilenet_v2": ("features", 4),
    "vgg16_bn": ("features", 1),
    "swin_t": ("permute", 2),
    "resnet8": ("blocks", 8),
}


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_number_of_activations(name, images):
    model = MODELS[name]()
    assert all(module.training for module in model.modules())
    sizes = []
    module, size = LAST_MAPS[name]
    model.get_submodule(module).register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-2:]))
    with torch.no_grad():
        assert model.eval()(images).shape == (2, 10)
    assert sizes == [(size, size)]
    sites = fe.find_sites(model, (images,))
    assert (len(sites), {site.activation for site in sites}) == (ACTIVATIONS[name][0], {ACTIVATIONS[name][1]})
    fe.linearize(model, [site.name for site in sites])
    with pytest.raises(ValueError, match="calls no known activation"):
        fe.find_sites(model, (images,))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "millions"), [("resnet18", 140), ("resnet18_wide_map", 555)])
def test_multiplications_as_published(name, images, millions):
    model, counted = MODELS[name]().eval(), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, x, y: counted.append(m.weight.numel() * y[0, 0].numel()))
    with torch.no_grad():
        model(images[:1])
    assert sum(counted) // 10**6 == millions


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_weights_depend_on_the_seed_alone(name):
    def build(seed):
        torch.manual_seed(seed)
        return MODELS[name]().state_dict()

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [0.25, 0.3])
def test_width_scales_the_channels_and_keeps_the_activations(name, width, images):
    model, full = MODELS[name](width).eval(), MODELS[name]()
    assert model(images).shape == (2, 10)
    assert len(fe.find_sites(model, (images,))) == ACTIVATIONS[name][0]
    convolutions = [path for path, module in full.named_modules() if isinstance(module, nn.Conv2d)]
    channels = [(model.get_submodule(path).out_channels, full.get_submodule(path).out_channels) for path in convolutions]
    if name == "mobilenet_v2":
        assert all(narrow % 8 == 0 and narrow <= wide for narrow, wide in channels)
    else:
        nearest = 3 if name == "swin_t" else 1
        assert all(abs(narrow - width * wide) <= nearest / 2 for narrow, wide in channels)


def test_resnet8_widths():
    layers = {name: module for name, module in resnet8().named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    widths = [module.weight.shape[0] for name, module in layers.items() if "shortcut" not in name]
    assert widths == [16, 16, 16, 32, 32, 64, 64, 10]
    assert len(layers) == 10


def test_swin_windows_fit_their_maps(images):
    maps = []
    model = swin_t().eval()
    for module in model.modules():
        if hasattr(module, "window_size"):
            module.register_forward_pre_hook(lambda module, inputs: maps.append((*module.window_size, *inputs[0].shape[1:3])))
    with torch.no_grad():
        model(images)
    assert sorted(set(maps)) == [(2, 2, 2, 2), (4, 4, 4, 4), (4, 4, 8, 8), (4, 4, 16, 16)]
