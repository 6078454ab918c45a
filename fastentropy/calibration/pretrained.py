"""Load a model of the transformers library, from a folder or the Hugging Face Hub, with its tokenizer or image processor."""

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

#: The default length of a row of a batch in tokens. If the limit of the model is lower, the limit is used.
MAX_LENGTH = 512
#: The dtype of the weights by the name of the option. "auto" is the dtype in which the weights are stored.
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: The kind of data that a model reads, by the name of its main argument.
KINDS = {"input_ids": "text", "pixel_values": "images"}
#: What makes the inputs of a model, by the kind of data: its name for messages, and its class in transformers.
PROCESSORS = {"text": ("tokenizer", "AutoTokenizer"), "images": ("image processor", "AutoImageProcessor")}
#: With this option, transformers does not run Python code that comes with a model, and does not ask the user about it.
NO_REMOTE_CODE = {"trust_remote_code": False}
#: How many evenly spaced values of a tensor are hashed, at least, for the fingerprint of a model; all if it has fewer.
SAMPLED_VALUES = 1024
#: Keys of a configuration that do not affect the model, and are left out of its fingerprint.
IGNORED_KEYS = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Pretrained:
    """A loaded model in eval mode, and what is needed to run it.

    Attributes:
        name: the folder of the model, or its name on the Hub.
        model: the model.
        kind: the kind of data that it reads, "text" or "images".
        processor: the tokenizer or image processor of transformers that belongs to the model.
        options: keyword arguments of every forward pass, besides the inputs.
    """

    name: str
    model: nn.Module
    kind: str
    processor: Any
    options: dict[str, Any]

    @property
    def unit(self) -> str:
        """The unit in which data is counted, "tokens" or "images"."""
        return "images" if self.kind == "images" else "tokens"

    @property
    def device(self) -> torch.device:
        """The device of the first parameter, on which the inputs must be."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter, to which images are converted."""
        return next(self.model.parameters()).dtype

    @property
    def _config(self) -> Any:
        """The configuration of the model, an object of transformers."""
        return self.model.config

    @property
    def _text_config(self) -> Any:
        """The part of the configuration that describes the text model, if there are several parts; otherwise all of it."""
        return self._config.get_text_config() if hasattr(self._config, "get_text_config") else self._config

    @property
    def max_length(self) -> int | None:
        """The largest number of tokens that the configuration and the tokenizer allow in a row; None if neither has a limit."""
        config = self._text_config
        limits = [getattr(config, "max_position_embeddings", None), getattr(self.processor, "model_max_length", None)]
        known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 40]
        return min(known, default=None)

    def takes_argument(self, name: str) -> bool:
        """Return whether the `forward` of the model, or of any of its submodules, has an argument of the given name."""
        return any(name in _arguments(module) for module in self.model.modules())

    def forward(self, inputs: dict[str, Tensor]) -> object:
        """Run the model on a batch. `options` switches off outputs that are not used, such as the key-value cache."""
        return self.model(**inputs, **self.options)

    def fingerprint(self) -> str:
        """Return a hash of the model, as 16 hexadecimal digits.

        It covers the configuration, the processor, and the names, shapes, dtypes and some evenly spaced values of each
        parameter and buffer.
        """
        digest = hashlib.sha256()
        for text in (self._config.to_dict(), _description(self.processor)):
            text = {key: value for key, value in text.items() if key not in IGNORED_KEYS}
            digest.update(json.dumps(text, sort_keys=True, default=str).encode())
        for name, tensor in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            values = tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLED_VALUES)]
            digest.update(values.double().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def has_experts(self) -> bool:
        """Return whether the model is a mixture of experts: its configuration states a number of experts above 1."""
        return any(
            (getattr(self._text_config, name, None) or 0) > 1
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
        )


def load_pretrained(name: str, *, kind: str, dtype: str, device: torch.device, device_map: str | None = None) -> Pretrained:
    """Load a model and its tokenizer or image processor from a folder, or download them from the Hugging Face Hub.

    Weights are read from safetensors files only. Python code that comes with a model is not run.

    Args:
        name: the folder of the model, or its name on the Hub.
        kind: the kind of data that the model must read, "text" or "images".
        dtype: the dtype of the weights, a name in `DTYPES`.
        device: where the model is placed.
        device_map: how the accelerate library spreads the model over several devices, such as "auto". If it is given, `device`
            is ignored.

    Returns:
        The model in eval mode with its processor.

    Raises:
        ValueError: the model is missing or damaged, lacks weights, or reads another kind of data. The message is one line.
    """
    library = require("transformers", "loading a model")
    config = _load(name, "configuration", lambda: library.AutoConfig.from_pretrained(name, **NO_REMOTE_CODE))
    model_class = _architecture_class(library, config)
    report = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options = {"dtype": DTYPES[dtype], "use_safetensors": True, **report, **NO_REMOTE_CODE}
    if device_map is not None:
        require("accelerate", "--device-map")
        options["device_map"] = device_map
    model, found = _load(name, "weights", lambda: model_class.from_pretrained(name, **options))
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder and a decoder, which need two texts; name a model that needs one")
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{name} lacks {len(missing)} of the weights of {model_class.__name__}, such as {missing[0]}")
    if others := sorted(found["mismatched_keys"]):
        raise ValueError(f"{name} has {len(others)} weights whose shapes differ from its configuration, such as {others[0][0]}")
    reads = KINDS.get(model.main_input_name, model.main_input_name)
    if reads != kind:
        raise ValueError(f"{name} reads {reads}, but the data is {kind}; name data of the model's kind with --data")
    what, processor_class = PROCESSORS[kind]
    processor = _load(name, what, lambda: getattr(library, processor_class).from_pretrained(name, **NO_REMOTE_CODE))
    if kind == "text":
        _prepare_tokenizer(name, processor, model)
    model = model.eval() if device_map else model.eval().to(device)
    return Pretrained(name, model, kind, processor, _forward_options(model))


def _description(processor: Any) -> dict[str, Any]:
    """Return the settings of a tokenizer or an image processor that affect the inputs it makes, for the fingerprint."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is not None:
        return {"tokenizer": backend.to_str(), "special": processor.special_tokens_map}
    return dict(processor.get_vocab() if hasattr(processor, "get_vocab") else processor.to_dict())


def _architecture_class(library: Any, config: Any) -> Any:
    """Return the class of transformers that the model was saved as, or AutoModel if the class is unknown.

    AutoModel would leave out some of the weights, such as those of the head.

    Args:
        library: the module `transformers`.
        config: the configuration of the model.
    """
    name, *_ = config.architectures or [""]
    found = getattr(library, name, None)
    return found if isinstance(found, type) and issubclass(found, library.PreTrainedModel) else library.AutoModel


def _load(name: str, what: str, load: Callable[[], Any]) -> Any:
    """Call a function that loads something by transformers, and turn any error into a ValueError with a message of one line.

    Args:
        name: the folder of the model, or its name on the Hub.
        what: what is loaded, for the message.
        load: the function.
    """
    with _quiet(are_bars_hidden=os.path.isdir(name)):  # without a download, each rank would draw bars
        try:
            return load()
        except Exception as error:  # of the client of the hub, of safetensors, of classes with a wrong configuration
            reason = textwrap.shorten(str(error), 200, placeholder=" …")
            raise ValueError(f"{name} has no {what} that can be loaded: {reason}") from error


@contextlib.contextmanager
def _quiet(are_bars_hidden: bool) -> Iterator[None]:
    """Silence the messages of transformers in a block, and its progress bars if `are_bars_hidden`. Errors are still raised."""
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
    """Make the tokenizer pad on the right, so the tokens keep their positions. `name` is the model's name, for the message.

    Raises:
        ValueError: the tokenizer has more tokens than the model, so it belongs to another model.
    """
    tokenizer.padding_side = "right"
    known = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= known:
        raise ValueError(f"{name}: the tokenizer has {largest + 1} tokens, but the model {known}; they do not belong together")


def _forward_options(model: nn.Module) -> dict[str, Any]:
    """Return arguments for `forward` that turn off the key-value cache and limit the logits to one token.

    An argument that `forward` does not take is left out.
    """
    arguments = _arguments(model)
    return {key: value for key, value in {"use_cache": False, "logits_to_keep": 1}.items() if key in arguments}


def _arguments(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's `forward`. The list is empty if `forward` has no Python signature."""
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return []
