"""Make batches of the documents of a chunk: token sequences, padded or packed, or images.

The batches depend on the chunk alone, so that they are the same on any rank.
"""

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastentropy._utils.optional import require
from fastentropy.calibration.data.documents import Chunk, Document, Problems

#: How many documents are passed to the tokenizer at a time.
MAX_TOKENIZED = 64
#: How many characters are passed to it at a time: a tokenizer needs some hundred bytes per token.
MAX_CHARACTERS = 1 << 20
#: The decoders of pillow that may be used; some others start programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


class Batch(NamedTuple):
    """The arguments of a model, on the CPU, and what they contain.

    Attributes:
        inputs: keyword arguments of the model.
        tokens: tokens without padding, special tokens included; in a batch of images, the images.
        documents: documents that begin in the batch.
        truncated: how many of them were truncated.
        tokens_cut: tokens lost by that.
    """

    inputs: dict[str, Tensor]
    tokens: int
    documents: int
    truncated: int = 0
    tokens_cut: int = 0


class Row(NamedTuple):
    """The tokens of one row of a batch, the number of documents that begin in it, and of tokens that were cut off."""

    tokens: list[int]
    documents: int
    cut: int = 0


class TextBatches:
    """Makes batches of texts: input_ids and attention_mask, int64 [rows, tokens].

    Padded: each row is a document, truncated to max_length, and padded to the longest of the batch on the tokenizer's side.
    Packed: the documents of a chunk form one sequence, with EOS between them, which is cut into rows of max_length. No token
    is lost, and only the last row is padded.

    Attributes:
        notice: what the user should know about the padding, or None.
    """

    def __init__(self, tokenizer: Any, *, batch_size: int, max_length: int, packing: bool = False) -> None:
        """Make batches with a tokenizer of transformers.

        Args:
            tokenizer: the tokenizer.
            batch_size: rows of a batch.
            max_length: the largest number of tokens in a row.
            packing: fill rows with several documents, instead of padding them.

        Raises:
            ValueError: the tokenizer lacks the special tokens that this needs, or max_length leaves no room for text.
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
        """Yield the batches of a chunk, without documents that have no tokens."""
        sequences = self._tokenized(chunk.documents)
        rows = self._packed(sequences) if self._packing else self._truncated(sequences)
        while group := list(itertools.islice(rows, self._batch_size)):
            yield self._stack(group)

    def _tokenized(self, documents: Iterable[Document]) -> Iterator[tuple[str, list[int]]]:
        """Yield each text with all its tokens."""
        for texts in _groups(documents):
            for text, tokens in zip(texts, self._encode(texts), strict=True):
                if len(tokens) > self._special:
                    yield text, tokens

    def _truncated(self, sequences: Iterable[tuple[str, list[int]]]) -> Iterator[Row]:
        for text, tokens in sequences:
            cut = max(len(tokens) - self._max_length, 0)
            if cut:  # the tokenizer knows the side to cut, and which special tokens stay
                tokens = self._encode([text], truncation=True, max_length=self._max_length)[0]
            yield Row(tokens, 1, cut)

    def _packed(self, sequences: Iterable[tuple[str, list[int]]]) -> Iterator[Row]:
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
        encoded = self._tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)
        return list(encoded["input_ids"])

    def _stack(self, rows: Sequence[Row]) -> Batch:
        width = max(len(row.tokens) for row in rows)
        input_ids = torch.full((len(rows), width), self._padding)
        attention_mask = torch.zeros_like(input_ids)
        for index, (tokens, *_) in enumerate(rows):
            columns = slice(width - len(tokens), None) if self._side == "left" else slice(len(tokens))
            input_ids[index, columns] = torch.tensor(tokens)
            attention_mask[index, columns] = 1
        return Batch(
            {"input_ids": input_ids, "attention_mask": attention_mask},
            tokens=sum(len(row.tokens) for row in rows),
            documents=sum(row.documents for row in rows),
            truncated=sum(row.cut > 0 for row in rows),
            tokens_cut=sum(row.cut for row in rows),
        )


class ImageBatches:
    """Makes batches of images: pixel_values, in the dtype and shape that the image processor returns."""

    #: Images need no notice.
    notice = None

    def __init__(self, image_processor: Any, *, batch_size: int) -> None:
        """Make batches with an image processor of transformers.

        Raises:
            ValueError: pillow is not installed.
        """
        self._processor, self._batch_size = image_processor, batch_size
        self._pillow = require("PIL.Image", "reading images"), require("PIL.ImageOps", "reading images")

    def batches(self, chunk: Chunk) -> Iterator[Batch]:
        """Yield the batches of a chunk. An image that cannot be decoded is skipped, and added to the chunk's problems."""
        images = self._decoded(chunk.documents, chunk.problems)
        while group := list(itertools.islice(images, self._batch_size)):
            pixels = self._processor(images=group, return_tensors="pt")["pixel_values"]
            yield Batch({"pixel_values": pixels}, tokens=len(group), documents=len(group))

    def _decoded(self, documents: Iterable[Document], problems: Problems) -> Iterator[Any]:
        """Yield the images, RGB and upright."""
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
    """Yield lists of texts that are tokenised in one call."""
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
    """Return the tokens between documents: EOS, or none if the tokenizer ends each document with a special token.

    Raises:
        ValueError: the tokenizer has neither.
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
    """Return the token to pad with, and a notice if it is not the tokenizer's padding token.

    Since padding is masked, any token that the model knows would do.

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
    return tokenizer.name_or_path or type(tokenizer).__name__
