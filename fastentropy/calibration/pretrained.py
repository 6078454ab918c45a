"""A model of the transformers library, from a folder or from the hub, with what makes its inputs."""

import hashlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy.calibration.documents import reason_of
from fastentropy.calibration.extras import require

#: Tokens of a row where nothing else is asked for, if the model takes as many.
MAX_LENGTH = 512
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Values of a parameter that tell it from another's, from its beginning.
COMPARED = 16


@dataclass(frozen=True)
class Pretrained:
    """A model in eval mode. kind: text or images, what it reads. processor: its tokenizer or its image processor."""

    name: str
    model: nn.Module
    kind: str
    processor: Any
    options: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of images."""
        return next(self.model.parameters()).dtype

    @property
    def max_length(self) -> int | None:
        """The most tokens that a row may have, None where nothing limits them."""
        config = getattr(self.model.config, "get_text_config", lambda: self.model.config)()
        limits = [getattr(config, "max_position_embeddings", None), getattr(self.processor, "model_max_length", None)]
        known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 40]
        return min(known, default=None)

    def forward(self, inputs: dict[str, Tensor]) -> object:
        """Run the model on a batch, without what only serves its outputs."""
        return self.model(**inputs, **self.options)

    def fingerprint(self) -> str:
        """A digest of names, shapes, dtypes and first values of all parameters, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().flatten()[:COMPARED].double().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_pretrained(name: str, *, kind: str, dtype: str, device: torch.device, device_map: str | None = None) -> Pretrained:
    """Load the model that is saved in a folder, or on the hub under a name, which is downloaded.

    kind: text or images, what it is to read. dtype: of DTYPES. device_map: of accelerate, in place of the device.

    Raises ValueError, one line, where it is missing or damaged, lacks weights, or reads something else. Only safetensors are
    read, and no code that comes with a model is run.
    """
    library = require("transformers", "loading a model")
    model_class = _of_architecture(library, _loaded(name, lambda: library.AutoConfig.from_pretrained(name)))
    options = {"dtype": DTYPES[dtype], "use_safetensors": True, "output_loading_info": True}
    if device_map is not None:
        require("accelerate", "--device-map")
        options["device_map"] = device_map
    model, found = _loaded(name, lambda: model_class.from_pretrained(name, **options))
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{name} lacks {len(missing)} of the weights of {model_class.__name__}, such as {missing[0]}")
    reads = "images" if model.main_input_name == "pixel_values" else "text"
    if reads != kind:
        raise ValueError(f"{name} reads {reads}, and the data is {kind}; name data of the model's kind with --data")
    processor_class = library.AutoTokenizer if kind == "text" else library.AutoImageProcessor
    processor = _loaded(name, lambda: processor_class.from_pretrained(name))
    if kind == "text":
        _prepare_tokenizer(name, processor, model)
    model = model.eval() if device_map else model.eval().to(device)
    return Pretrained(name, model, kind, processor, _forward_options(model))


def _of_architecture(library: Any, config: Any) -> Any:
    """The class that the model was saved as, so that all of its weights are used; its bare form where that is not known."""
    names = config.architectures or [""]
    return getattr(library, names[0], library.AutoModel)


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    """What a loader of transformers gives, without bars, which each rank would draw, where nothing is downloaded."""
    logging = require("transformers.utils.logging", "loading a model")
    hides_bars = os.path.isdir(name) and logging.is_progress_bar_enabled()
    if hides_bars:
        logging.disable_progress_bar()
    try:
        return load()
    except Exception as error:  # of the hub's client, of safetensors, of classes that are given a wrong configuration
        raise ValueError(f"{name} is no model that can be loaded: {reason_of(error)}") from error
    finally:
        if hides_bars:
            logging.enable_progress_bar()


def _prepare_tokenizer(name: str, tokenizer: Any, model: Any) -> None:
    """Pad on the right, where the positions of tokens do not change. Raises ValueError where it has other tokens."""
    tokenizer.padding_side = "right"
    known = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= known:
        raise ValueError(f"{name}: its tokenizer knows {largest + 1} tokens and its model {known}; they are not of one model")


def _forward_options(model: nn.Module) -> dict[str, Any]:
    """No key-value cache, and the logits of one token only, where the model has such options."""
    parameters = inspect.signature(model.forward).parameters
    return {key: value for key, value in {"use_cache": False, "logits_to_keep": 1}.items() if key in parameters}
