"""Batches of any size contain each token of a chunk's documents once, in order."""

import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from fastentropy.calibration.data import batching
from fastentropy.calibration.data.batching import ImageBatches, TextBatches
from fastentropy.calibration.data.documents import Chunk, Document, Place, Problems

WORDS = [f"w{number}" for number in range(20)]
SPECIAL = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "cls_token": "<cls>"}
IDS = {token: number for number, token in enumerate([*SPECIAL.values(), "<sep>", "a", *WORDS])}
# The special tokens that a tokenizer adds to a document.
TEMPLATES = {"nothing": "$A", "bos": "<bos> $A", "both ends": "<cls> $A <sep>", "eos": "$A <eos>"}


def make_tokenizer(template="nothing", side="right", without=()):
    backend = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(token, IDS[token]) for token in ("<bos>", "<eos>", "<cls>", "<sep>")]
    backend.post_processor = processors.TemplateProcessing(single=TEMPLATES[template], special_tokens=special)
    names = {name: token for name, token in SPECIAL.items() if name not in without}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, **names)


def chunk_of(contents):
    documents = (Document(content, Place("a.txt", "row", row)) for row, content in enumerate(contents))
    return Chunk(0, 0, documents, Problems())


def encoded(text, template):
    """Return the tokens of a text, special tokens included."""
    before, after = TEMPLATES[template].split("$A")
    return [IDS[token] for token in [*before.split(), *text.split(), *after.split()]]


def rows_of(batch):
    """Check the form of a batch; return the tokens of each row that are not masked."""
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert list(batch.inputs) == ["input_ids", "attention_mask"]
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape
    assert batch.tokens == mask.sum()
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


documents_of_words = st.lists(st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join), max_size=12)
each_template = st.sampled_from(list(TEMPLATES))
DRAWN = {
    "texts": documents_of_words,
    "template": each_template,
    "side": st.sampled_from(["left", "right"]),
    "batch_size": st.integers(1, 5),
    "max_length": st.integers(3, 40),
}


@settings(max_examples=100)
@given(
    **DRAWN,
    together=st.integers(1, 5),
)
def test_padded_rows_are_documents(texts, template, side, batch_size, max_length, together):
    tokenizer = make_tokenizer(template, side)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "MAX_TOKENIZED", together)
        batches = list(TextBatches(tokenizer, batch_size=batch_size, max_length=max_length).batches(chunk_of(texts)))
    texts = [text for text in texts if text]
    whole = [encoded(text, template) for text in texts]
    kept = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    assert [row for batch in batches for row in rows_of(batch)] == kept
    assert all(len(batch.inputs["input_ids"]) == batch_size for batch in batches[:-1])
    for batch in batches:
        padding = batch.inputs["attention_mask"] == 0
        assert (batch.inputs["input_ids"][padding] == IDS["<pad>"]).all()
        assert not padding[:, -1 if side == "left" else 0].any()
        assert not padding.all(0).any()
    assert sum(batch.documents for batch in batches) == len(texts)
    assert sum(batch.tokens_cut for batch in batches) == sum(map(len, whole)) - sum(map(len, kept))
    assert sum(batch.truncated for batch in batches) == sum(len(tokens) > max_length for tokens in whole)


@settings(max_examples=100)
@given(
    **DRAWN,
    characters=st.integers(1, 100),
)
def test_packed_rows_are_the_joined_documents(texts, template, side, batch_size, max_length, characters):
    tokenizer = make_tokenizer(template, side)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "MAX_CHARACTERS", characters)
        maker = TextBatches(tokenizer, batch_size=batch_size, max_length=max_length, packing=True)
        batches = list(maker.batches(chunk_of(texts)))
    joined = []
    for text in filter(None, texts):
        if joined and template in ("nothing", "bos"):
            joined.append(IDS["<eos>"])
        joined += encoded(text, template)
    rows = [row for batch in batches for row in rows_of(batch)]
    assert list(itertools.chain(*rows)) == joined
    assert all(len(row) == max_length for row in rows[:-1])
    assert all(len(batch.inputs["input_ids"]) == batch_size for batch in batches[:-1])
    assert all(batch.inputs["attention_mask"][:, 0].all() for batch in batches)
    assert sum(batch.documents for batch in batches) == len(list(filter(None, texts)))
    assert not any(batch.truncated or batch.tokens_cut for batch in batches)


def test_batches_are_lazy():
    read = []
    documents = (read.append(text) or Document(text, Place("", "row", 0)) for text in ["w1 w2"] * 1000)
    batches = TextBatches(make_tokenizer(), batch_size=2, max_length=8).batches(Chunk(0, 0, documents, Problems()))
    assert not read
    next(batches)
    assert len(read) == batching.MAX_TOKENIZED


@pytest.mark.parametrize("packing", [False, True])
def test_eos_pads_without_a_padding_token(packing):
    maker = TextBatches(make_tokenizer(without=["pad_token"]), batch_size=2, max_length=4, packing=packing)
    assert "has no padding token; EOS is used instead" in maker.notice
    (batch,) = maker.batches(chunk_of(["w1 w2 w3", "w4 w5"]))
    expected = [["w1", "w2", "w3", "<eos>"], ["w4", "w5"]] if packing else [["w1", "w2", "w3"], ["w4", "w5"]]
    assert rows_of(batch) == [[IDS[token] for token in row] for row in expected]
    assert batch.inputs["input_ids"][1, -1] == IDS["<eos>"]
    assert TextBatches(make_tokenizer(), batch_size=2, max_length=4, packing=packing).notice is None


def test_padding_without_token_or_eos():
    tokenizer = make_tokenizer(without=["pad_token", "eos_token"])
    with pytest.raises(ValueError, match=r"has neither a padding token nor EOS; set pad_token in .*--batch-size 1") as error:
        TextBatches(tokenizer, batch_size=2, max_length=4)
    assert "\n" not in str(error.value)
    batches = TextBatches(tokenizer, batch_size=1, max_length=4).batches(chunk_of(["w1 w2", "w3"]))
    assert [rows_of(batch) for batch in batches] == [[[IDS["w1"], IDS["w2"]]], [[IDS["w3"]]]]


def test_packing_requires_a_separator():
    with pytest.raises(ValueError, match="has no EOS token to pack documents with; leave --packing out"):
        TextBatches(make_tokenizer(without=["eos_token"]), batch_size=2, max_length=4, packing=True)
    TextBatches(make_tokenizer("both ends", without=["eos_token", "pad_token"]), batch_size=2, max_length=4, packing=True)


def test_max_length_leaves_room_for_text():
    with pytest.raises(ValueError, match="max_length: got 2, expected more than the 2 special tokens of a document"):
        TextBatches(make_tokenizer("both ends"), batch_size=2, max_length=2)


# Images --------------------------------------------------------------------------------------------------------------


def image_file(size, mode="RGB", kind="PNG", value=100, **options):
    buffer = io.BytesIO()
    Image.new(mode, size, value).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size={"height": 8, "width": 8})


def test_image_batches(processor):
    good = [image_file((10, 12)), image_file((5, 5), "L"), image_file((8, 8), "RGBA", value=(1, 2, 3, 4))]
    good += [image_file((9, 9), kind=kind) for kind in ("JPEG", "WEBP", "BMP")] + [image_file((9, 9), "P")]
    chunk = chunk_of([good[0], b"no image", *good[1:], image_file((64, 64), kind="JPEG")[:300], b""])
    batches = list(ImageBatches(processor, batch_size=3).batches(chunk))
    assert [batch.tokens for batch in batches] == [batch.documents for batch in batches] == [3, 3, 1]
    decoded = [Image.open(io.BytesIO(data)).convert("RGB") for data in good]
    pixels = torch.cat([batch.inputs["pixel_values"] for batch in batches])
    assert torch.equal(pixels, processor(images=decoded, return_tensors="pt")["pixel_values"])
    assert [(problem.what, problem.position, problem.times) for problem in chunk.problems] == [
        ("an image cannot be decoded", 1, 3)
    ]


def test_images_are_upright(processor):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 3
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    (batch,) = ImageBatches(processor, batch_size=3).batches(chunk_of([buffer.getvalue()]))
    expected = processor(images=Image.fromarray(pixels[:, ::-1].copy()), return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.inputs["pixel_values"], expected)
