"""Padding is left out whatever the masks of the other passes are: full, absent or padded, in any order."""

import pytest
import torch

from fastentropy import collect

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, intermediate_size=40, num_key_value_heads=1),
    "bert": lambda: transformers.BertConfig(**SMALL, intermediate_size=40),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2),
    "opt": lambda: transformers.OPTConfig(**SMALL, ffn_dim=40, word_embed_proj_dim=24, max_position_embeddings=64),
}
FULL, PADDED, LEFT = torch.ones(3, 9).long(), torch.ones(3, 9).long(), torch.ones(3, 9).long()
PADDED[1, 4:] = PADDED[2, 7:] = LEFT[0, :3] = 0
SHORT = PADDED[1:, :6]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "masks", [[FULL, PADDED], [None, PADDED], [PADDED, FULL, LEFT], [FULL, FULL, FULL, FULL, PADDED], [LEFT, None, SHORT]]
)
def test_passes_with_other_masks_before(name, masks):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS[name]()).eval()
    with torch.inference_mode(), collect(model) as collector:
        for mask in masks:
            model(input_ids=torch.randint(3, 50, (FULL if mask is None else mask).shape), attention_mask=mask)
    tokens = sum(int((FULL if mask is None else mask).sum()) for mask in masks)
    statistics = collector.compute()
    assert {site: each.observations // each.neurons for site, each in statistics.items()} == dict.fromkeys(statistics, tokens)
