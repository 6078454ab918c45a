"""Networks of torchvision and transformers, compiled: the counts of eager mode, one compilation, no graph break."""

import warnings

import pytest
import torch
from torch._dynamo.utils import counters

import fastentropy as fe
from tests._helpers.compiling import NotingBackend, assert_same

pytestmark = pytest.mark.slow


def vision(name, **options):
    import torchvision

    return getattr(torchvision.models, name)(**options), {"": torch.randn(2, 3, 64, 64)}


def tokens(name, **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(vocab_size=50, use_cache=False, **options)
    return getattr(transformers, f"{name}Model")(config), {"input_ids": torch.randint(0, 50, (2, 9))}


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
NETWORKS = {
    "mobilenet_v3_small": lambda: vision("mobilenet_v3_small"),
    "squeezenet1_1": lambda: vision("squeezenet1_1"),
    "Llama": lambda: tokens("Llama", **SMALL),
    "GPT2": lambda: tokens("GPT2", n_embd=16, n_layer=2, n_head=2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    model.eval()
    args, kwargs = ([inputs[""]], {}) if "" in inputs else ([], inputs)
    backend = NotingBackend("eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fe.isolate")
        with fe.collect(model) as expected:
            for _ in range(4):
                model(*args, **kwargs)
        warnings.simplefilter("error", UserWarning)
        compiled(*args, **kwargs)
        backend.compilations()
        for compilations in (1, 0):
            with fe.collect(compiled) as collector:
                for _ in range(4):
                    compiled(*args, **kwargs)
            assert backend.compilations() == compilations
            assert_same(collector.compute(), expected.compute())
        compiled(*args, **kwargs)
    assert backend.compilations() == 0
    assert not counters["graph_break"]
