"""Make batches of the documents of a chunk (a piece of the corpus): padded or packed sequences of tokens, or images.

The batches depend on the chunk alone, so they do not change with the number of ranks.
"""

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastentropy._utils.optional import require
from fastentropy.calibration.data.documents import Chunk, Document, Problems

#: The largest number of texts that are passed to the tokenizer in one call.
MAX_TOKENIZED = 64
#: No further text is added to a call once it has this many characters. Larger calls would take much memory, because a tokenizer
#: needs some hundred bytes per token.
MAX_CHARACTERS = 1 << 20
#: The formats that pillow may decode. Others are excluded, because some of their decoders start programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


class Batch(NamedTuple):
    """The inputs of a model for one forward pass, and how much data they hold.

    Attributes:
        inputs: keyword arguments of the model, tensors on the CPU.
        tokens: the number of tokens, with special tokens and without padding; in a batch of images, the number of images.
        documents: the number of documents (texts or images) that begin in the batch.
        truncated: how many of these documents were truncated.
        tokens_cut: how many tokens were removed by truncation.
    """

    inputs: dict[str, Tensor]
    tokens: int
    documents: int
    truncated: int = 0
    tokens_cut: int = 0


class Row(NamedTuple):
    """The tokens of one row of a batch.

    Attributes:
        tokens: the ids of the tokens, without padding.
        documents: the number of documents that begin in the row. The separator before a document counts as its beginning.
        cut: how many tokens were removed from the document by truncation.
    """

    tokens: list[int]
    documents: int
    cut: int = 0


class TextBatches:
    """Makes batches of texts. The inputs of a batch are `input_ids` and `attention_mask`, both int64 [rows, tokens].

    Without packing, each row holds one document. It is truncated to `max_length` tokens, and padded to the longest row of the
    batch on the side that the tokenizer prescribes.

    With packing, the documents of a chunk are joined to one sequence, with an EOS token between them unless the tokenizer ends
    documents with a special token anyway. The sequence is cut into rows of `max_length` tokens. No token is lost, and only the
    last row of a chunk may be padded.

    Attributes:
        notice: a sentence for the user about the padding token, or None.
    """

    def __init__(self, tokenizer: Any, *, batch_size: int, max_length: int, packing: bool = False) -> None:
        """Prepare to make batches.

        Args:
            tokenizer: a tokenizer of transformers.
            batch_size: the number of rows in a batch. The last batch of a chunk may have fewer.
            max_length: the largest number of tokens in a row, special tokens included.
            packing: whether rows are filled with several documents instead of padded.

        Raises:
            ValueError: the tokenizer lacks a special token that padding or packing needs, or `max_length` leaves no room for
                text.
        """
        self._tokenizer, self._batch_size, self._max_length, self._packing = tokenizer, batch_size, max_length, packing
        self._special = tokenizer.num_special_tokens_to_add()
        if max_length <= self._special:
            raise ValueError(
                f"max_length: got {max_length}, expected more than the {self._special} special tokens of a document"
            )
        self._separator = _separator(tokenizer) if packing else []
        self._side = "right" if packing else tokenizer.padding_side
        self._padding, self.notice = _padding(tokenizer, is_needed=batch_size > 1 and not packing)

    def batches(self, chunk: Chunk) -> Iterator[Batch]:
        """Yield the batches of a chunk. Documents that consist of special tokens only are left out."""
        sequences = self._tokenized(chunk.documents)
        rows = self._packed(sequences) if self._packing else self._truncated(sequences)
        while group := list(itertools.islice(rows, self._batch_size)):
            yield self._stack(group)

    def _tokenized(self, documents: Iterable[Document]) -> Iterator[tuple[str, list[int]]]:
        """Yield each text with the ids of all its tokens. Texts that consist of special tokens only are left out."""
        for texts in _groups(documents):
            for text, tokens in zip(texts, self._encode(texts), strict=True):
                if len(tokens) > self._special:
                    yield text, tokens

    def _truncated(self, sequences: Iterable[tuple[str, list[int]]]) -> Iterator[Row]:
        """Yield one row for each text, truncated to `max_length` tokens.

        Args:
            sequences: what `_tokenized` yields.
        """
        for text, tokens in sequences:
            cut = max(len(tokens) - self._max_length, 0)
            if cut:  # the tokenizer knows which side to cut and which special tokens to keep
                tokens = self._encode([text], truncation=True, max_length=self._max_length)[0]
            yield Row(tokens, 1, cut)

    def _packed(self, sequences: Iterable[tuple[str, list[int]]]) -> Iterator[Row]:
        """Join all texts to one sequence of tokens, and yield rows of `max_length` tokens. The last one may be shorter.

        Args:
            sequences: what `_tokenized` yields.
        """
        row: list[int] = []
        documents = 0
        for index, (_, tokens) in enumerate(sequences):
            row += self._separator + tokens if index else tokens
            documents += 1
            full = len(row) // self._max_length * self._max_length
            for start in range(0, full, self._max_length):
                yield Row(row[start : start + self._max_length], documents)
                documents = 0
            row = row[full:]
        if row:
            yield Row(row, documents)

    def _encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        """Return the ids of the tokens of each text, special tokens included. `options` are passed to the tokenizer."""
        encoded = self._tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)
        return list(encoded["input_ids"])

    def _stack(self, rows: Sequence[Row]) -> Batch:
        """Pad rows to the length of the longest one, and return them as a batch."""
        width = max(len(row.tokens) for row in rows)
        input_ids = torch.full((len(rows), width), self._padding, device="cpu")
        attention_mask = torch.zeros_like(input_ids)
        for index, (tokens, *_) in enumerate(rows):
            columns = slice(width - len(tokens), None) if self._side == "left" else slice(len(tokens))
            input_ids[index, columns] = torch.tensor(tokens, device="cpu")
            attention_mask[index, columns] = 1
        return Batch(
            {"input_ids": input_ids, "attention_mask": attention_mask},
            tokens=sum(len(row.tokens) for row in rows),
            documents=sum(row.documents for row in rows),
            truncated=sum(row.cut > 0 for row in rows),
            tokens_cut=sum(row.cut for row in rows),
        )


class ImageBatches:
    """Makes batches of images. The input is `pixel_values`, with the dtype and the shape that the image processor returns."""

    #: A sentence for the user, as in `TextBatches`. There is none for images.
    notice = None

    def __init__(self, image_processor: Any, *, batch_size: int) -> None:
        """Prepare to make batches.

        Args:
            image_processor: an image processor of transformers.
            batch_size: the number of images in a batch. The last batch of a chunk may have fewer.

        Raises:
            ValueError: pillow is not installed.
        """
        self._processor, self._batch_size = image_processor, batch_size
        self._pillow = require("PIL.Image", "reading images"), require("PIL.ImageOps", "reading images")

    def batches(self, chunk: Chunk) -> Iterator[Batch]:
        """Yield the batches of a chunk. An image that cannot be decoded is left out and added to the problems of the chunk."""
        images = self._decoded(chunk.documents, chunk.problems)
        while group := list(itertools.islice(images, self._batch_size)):
            pixels = self._processor(images=group, return_tensors="pt")["pixel_values"]
            yield Batch({"pixel_values": pixels}, tokens=len(group), documents=len(group))

    def _decoded(self, documents: Iterable[Document], problems: Problems) -> Iterator[Any]:
        """Yield the images as RGB images of pillow, turned upright by their EXIF data. Add undecodable ones to `problems`."""
        image_module, operations = self._pillow
        for content, place in documents:
            try:
                with image_module.open(io.BytesIO(cast(bytes, content)), formats=IMAGE_FORMATS) as image:
                    decoded = operations.exif_transpose(image).convert("RGB")
            except Exception:  # decoders raise many types of errors for broken files
                problems.add(place, "an image cannot be decoded")
            else:
                yield decoded


def _groups(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Divide texts into lists, and yield the lists. Each is short enough to be tokenised in one call."""
    group: list[str] = []
    characters = 0
    for content, _ in documents:
        group.append(cast(str, content))
        characters += len(content)
        if len(group) == MAX_TOKENIZED or characters >= MAX_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _separator(tokenizer: Any) -> list[int]:
    """Return the ids of the tokens to insert between documents when they are packed into rows.

    This is EOS, or nothing if the tokenizer ends each document with a special token anyway.

    Raises:
        ValueError: the tokenizer has no EOS token and ends documents with no special token.
    """
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    if mask and mask[-1]:
        return []
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {_name(tokenizer)} has no EOS token to pack documents with; leave --packing out, "
            "or set eos_token in its tokenizer_config.json"
        )
    return [tokenizer.eos_token_id]


def _padding(tokenizer: Any, is_needed: bool) -> tuple[int, str | None]:
    """Choose the token to pad with. Any token that the model knows would do, because padding is masked.

    Args:
        tokenizer: a tokenizer of transformers.
        is_needed: whether rows will be padded.

    Returns:
        The id of the token, and a sentence for the user if EOS replaces a missing padding token; otherwise None.

    Raises:
        ValueError: padding is needed, but the tokenizer has neither a padding token nor EOS.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id, None
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id, f"the tokenizer {_name(tokenizer)} has no padding token; EOS is used instead, and masked"
    if is_needed:
        raise ValueError(
            f"the tokenizer {_name(tokenizer)} has neither a padding token nor EOS; set pad_token in its "
            "tokenizer_config.json, or use --batch-size 1, which needs no padding"
        )
    return 0, None


def _name(tokenizer: Any) -> str:
    """Return the name of a tokenizer for a message."""
    return tokenizer.name_or_path or type(tokenizer).__name__
