"""A model of the transformers library, from a folder or from the hub, with what makes its inputs."""

import contextlib
import hashlib
import inspect
import itertools
import json
import os
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy._utils.optional import require

#: Tokens of a row where nothing else is asked for, if the model takes as many.
MAX_LENGTH = 512
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: What a model reads, by its main argument.
KINDS = {"input_ids": "text", "pixel_values": "images"}
#: What makes the inputs of a model, and its class in transformers.
PROCESSORS = {"text": ("tokenizer", "AutoTokenizer"), "images": ("image processor", "AutoImageProcessor")}
#: Python code that lies beside a model is neither run nor asked about.
OWN_CODE = {"trust_remote_code": False}
#: Values of a tensor that tell it from another's, at equal distances.
COMPARED = 1024
#: What a configuration says that makes no difference to the model.
NO_DIFFERENCE = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Pretrained:
    """A model in eval mode. kind: text or images, what it reads. processor: its tokenizer or its image processor."""

    name: str
    model: nn.Module
    kind: str
    processor: Any
    options: dict[str, Any]

    @property
    def unit(self) -> str:
        """What is counted of the data."""
        return "images" if self.kind == "images" else "tokens"

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of images."""
        return next(self.model.parameters()).dtype

    @property
    def _config(self) -> Any:
        return self.model.config

    @property
    def _text_config(self) -> Any:
        """The part of the configuration that is about texts, where there are others."""
        return self._config.get_text_config() if hasattr(self._config, "get_text_config") else self._config

    @property
    def max_length(self) -> int | None:
        """The most tokens that a row may have, None where nothing limits them."""
        config = self._text_config
        limits = [getattr(config, "max_position_embeddings", None), getattr(self.processor, "model_max_length", None)]
        known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 40]
        return min(known, default=None)

    def takes(self, argument: str) -> bool:
        """Whether the model, or a part of it, has an argument of that name."""
        return any(argument in _arguments(module) for module in self.model.modules())

    def forward(self, inputs: dict[str, Tensor]) -> object:
        """Run the model on a batch, without what only serves its outputs."""
        return self.model(**inputs, **self.options)

    def fingerprint(self) -> str:
        """A digest, 16 hexadecimal digits, of the configuration, the processor, and of all parameters and buffers.

        Of these: names, shapes, dtypes and COMPARED values.
        """
        digest = hashlib.sha256()
        for text in (self._config.to_dict(), _description(self.processor)):
            text = {key: value for key, value in text.items() if key not in NO_DIFFERENCE}
            digest.update(json.dumps(text, sort_keys=True, default=str).encode())
        for name, tensor in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            values = tensor.detach().flatten()[:: max(1, tensor.numel() // COMPARED)]
            digest.update(values.double().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts, by what configurations call their number."""
        return any(
            (getattr(self._text_config, name, None) or 0) > 1
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
        )


def load_pretrained(name: str, *, kind: str, dtype: str, device: torch.device, device_map: str | None = None) -> Pretrained:
    """Load the model that is saved in a folder, or on the hub under a name, which is downloaded.

    kind: text or images, what it is to read. dtype: of DTYPES. device_map: of accelerate, in place of the device.

    Raises ValueError, one line, where it is missing or damaged, lacks weights, or reads something else. Only safetensors are
    read, and no code that comes with a model is run.
    """
    library = require("transformers", "loading a model")
    config = _loaded(name, "configuration", lambda: library.AutoConfig.from_pretrained(name, **OWN_CODE))
    model_class = _of_architecture(library, config)
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options = {"dtype": DTYPES[dtype], "use_safetensors": True, **told, **OWN_CODE}
    if device_map is not None:
        require("accelerate", "--device-map")
        options["device_map"] = device_map
    model, found = _loaded(name, "weights", lambda: model_class.from_pretrained(name, **options))
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder and a decoder, which needs two texts; name a model that needs one")
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{name} lacks {len(missing)} of the weights of {model_class.__name__}, such as {missing[0]}")
    if others := sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{name} has {len(others)} weights of other shapes than its configuration says, such as {others[0][0]}"
        )
    reads = KINDS.get(model.main_input_name, model.main_input_name)
    if reads != kind:
        raise ValueError(f"{name} reads {reads}, and the data is {kind}; name data of the model's kind with --data")
    what, processor_class = PROCESSORS[kind]
    processor = _loaded(name, what, lambda: getattr(library, processor_class).from_pretrained(name, **OWN_CODE))
    if kind == "text":
        _prepare_tokenizer(name, processor, model)
    model = model.eval() if device_map else model.eval().to(device)
    return Pretrained(name, model, kind, processor, _forward_options(model))


def _description(processor: Any) -> dict[str, Any]:
    """What decides the inputs that a tokenizer or an image processor makes."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is not None:
        return {"tokenizer": backend.to_str(), "special": processor.special_tokens_map}
    return dict(processor.get_vocab() if hasattr(processor, "get_vocab") else processor.to_dict())


def _of_architecture(library: Any, config: Any) -> Any:
    """The class that the model was saved as, so that all of its weights are used; its bare form where that is not known."""
    name, *_ = config.architectures or [""]
    found = getattr(library, name, None)
    return found if isinstance(found, type) and issubclass(found, library.PreTrainedModel) else library.AutoModel


def _loaded(name: str, what: str, load: Callable[[], Any]) -> Any:
    """What a loader of transformers gives."""
    with _quiet(are_bars_hidden=os.path.isdir(name)):  # each rank would draw them, where nothing is downloaded
        try:
            return load()
        except Exception as error:  # of the hub's client, of safetensors, of classes that are given a wrong configuration
            reason = textwrap.shorten(str(error), 200, placeholder=" …")
            raise ValueError(f"{name} has no {what} that can be loaded: {reason}") from error


@contextlib.contextmanager
def _quiet(are_bars_hidden: bool) -> Iterator[None]:
    """Let transformers say nothing while it loads: what matters is an error of ours."""
    logging = require("transformers.utils.logging", "loading a model")
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if are_bars_hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
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
    arguments = _arguments(model)
    return {key: value for key, value in {"use_cache": False, "logits_to_keep": 1}.items() if key in arguments}


def _arguments(module: nn.Module) -> list[str]:
    """The names of the arguments of a module's forward; none where it has no signature, as it is in C."""
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return []
