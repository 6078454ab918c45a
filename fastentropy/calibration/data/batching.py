"""Batches for a model, made of the documents of one chunk: token sequences that are padded or packed, and images.

The batches of a chunk depend on nothing but the chunk, so that they are the same on any rank.
"""

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastentropy._utils.optional import require
from fastentropy.calibration.data.documents import Chunk, Document, Problems

#: Documents that are given to a tokenizer at a time.
TOKENIZED_TOGETHER = 64
#: Fewer where they are long: a tokenizer needs some hundred bytes for each token.
CHARACTERS_TOGETHER = 1 << 20
#: Decoders of pillow that may be used: some others start programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


class Batch(NamedTuple):
    """The arguments of a model, on the CPU, and what they hold.

    tokens: tokens that are not padding, special ones included; images where it is a batch of these. documents: how many begin
    in it. truncated: how many of them were cut off, and tokens_cut: what that cost.
    """

    inputs: dict[str, Tensor]
    tokens: int
    documents: int
    truncated: int = 0
    tokens_cut: int = 0


class Row(NamedTuple):
    """Tokens of one row of a batch, with the documents that begin in it, and the tokens that were cut off."""

    tokens: list[int]
    documents: int
    cut: int = 0


class TextBatches:
    """Makes batches of texts: input_ids and attention_mask, int64 [rows, tokens].

    Padded: a document in each row, truncated to max_length and padded to the longest of the batch, on the tokenizer's side.
    Packed: the documents of a chunk in one sequence, with EOS between them, which is cut into rows of max_length, so that no
    token is lost; only the last row is padded. notice says what else a user should know, or is None.
    """

    def __init__(self, tokenizer: Any, *, batch_size: int, max_length: int, packing: bool = False) -> None:
        """tokenizer: of transformers. Raises ValueError where it has not the special tokens that this needs."""
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
        """The batches of a chunk. Documents without tokens are passed over."""
        sequences = self._tokenized(chunk.documents)
        rows = self._packed(sequences) if self._packing else self._truncated(sequences)
        while group := list(itertools.islice(rows, self._batch_size)):
            yield self._stack(group)

    def _tokenized(self, documents: Iterable[Document]) -> Iterator[tuple[str, list[int]]]:
        """Each text with all of its tokens."""
        for texts in _groups(documents):
            for text, tokens in zip(texts, self._encode(texts), strict=True):
                if len(tokens) > self._special:
                    yield text, tokens

    def _truncated(self, sequences: Iterable[tuple[str, list[int]]]) -> Iterator[Row]:
        for text, tokens in sequences:
            cut = max(len(tokens) - self._max_length, 0)
            if cut:  # the tokenizer knows on which side, and which special tokens stay
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
            place = slice(width - len(tokens), None) if self._side == "left" else slice(len(tokens))
            input_ids[index, place] = torch.tensor(tokens)
            attention_mask[index, place] = 1
        return Batch(
            {"input_ids": input_ids, "attention_mask": attention_mask},
            tokens=sum(len(row.tokens) for row in rows),
            documents=sum(row.documents for row in rows),
            truncated=sum(row.cut > 0 for row in rows),
            tokens_cut=sum(row.cut for row in rows),
        )


class ImageBatches:
    """Makes batches of images: pixel_values, of the dtype and shape that the image processor gives."""

    #: What a user should know: nothing.
    notice = None

    def __init__(self, image_processor: Any, *, batch_size: int) -> None:
        """image_processor: of transformers. Raises ValueError where pillow is missing."""
        self._processor, self._batch_size = image_processor, batch_size
        self._pillow = require("PIL.Image", "reading images"), require("PIL.ImageOps", "reading images")

    def batches(self, chunk: Chunk) -> Iterator[Batch]:
        """The batches of a chunk. An image that cannot be decoded is added to the chunk's problems, and passed over."""
        images = self._decoded(chunk.documents, chunk.problems)
        while group := list(itertools.islice(images, self._batch_size)):
            pixels = self._processor(images=group, return_tensors="pt")["pixel_values"]
            yield Batch({"pixel_values": pixels}, tokens=len(group), documents=len(group))

    def _decoded(self, documents: Iterable[Document], problems: Problems) -> Iterator[Any]:
        """The images, RGB and upright."""
        image_module, operations = self._pillow
        for content, place in documents:
            try:
                with image_module.open(io.BytesIO(cast(bytes, content)), formats=IMAGE_FORMATS) as image:
                    decoded = operations.exif_transpose(image).convert("RGB")
            except Exception:  # what decoders raise for broken files is of many types
                problems.add(place, "an image cannot be decoded")
            else:
                yield decoded


def _groups(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Texts that are tokenised in one call."""
    group: list[str] = []
    characters = 0
    for content, _ in documents:
        group.append(cast(str, content))
        characters += len(content)
        if len(group) == TOKENIZED_TOGETHER or characters >= CHARACTERS_TOGETHER:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _separator(tokenizer: Any) -> list[int]:
    """What stands between documents: EOS, or nothing where the tokenizer itself ends each with a special token.

    Raises ValueError where there is neither.
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
    """The token to pad with, and a notice where it is not the tokenizer's own. Raises ValueError where there is none.

    Any token would do, since padding is masked, but one that the model knows.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id, None
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id, f"the tokenizer {_name(tokenizer)} has no padding token; EOS is padded with, and masked"
    if is_needed:
        raise ValueError(
            f"the tokenizer {_name(tokenizer)} has neither a padding token nor EOS; set pad_token in its "
            "tokenizer_config.json, or take --batch-size 1, which needs no padding"
        )
    return 0, None


def _name(tokenizer: Any) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
