"""Checkpoints in forms of their own, served: both of Mistral's formats, and the inner model."""

import json
import shutil

import torch
from engines import assert_greedy_equals, engine, greedy, load_reference, make_pair
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from vllm_adafuse.tiny import real_prompts

PARTS = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm"}


def add_mistrals_format(base):
    """params.json and consolidated.safetensors, in which rotary pairs stand beside each other."""
    config = json.loads((base / "config.json").read_text())
    keys = {
        "dim": "hidden_size", "n_layers": "num_hidden_layers", "head_dim": "head_dim",
        "hidden_dim": "intermediate_size", "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps",
        "vocab_size": "vocab_size", "max_position_embeddings": "max_position_embeddings",
    }  # fmt: skip
    params = {own: config[theirs] for own, theirs in keys.items()} | {"rope_theta": 10000.0}
    (base / "params.json").write_text(json.dumps(params))
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows, columns = tensor.shape
            heads = rows // config["head_dim"]
            tensor = tensor.view(heads, 2, -1, columns).transpose(1, 2).reshape(rows, columns)
        for old, new in OUTER.items():
            name = name.replace(old, new)
        for old, new in PARTS.items():
            name = name.replace(old, new)
        tensors[name.removeprefix("model.")] = tensor.contiguous()
    save_file(tensors, base / "consolidated.safetensors")


def test_a_directory_in_both_of_mistrals_formats(tmp_path):
    base, adapter = make_pair(tmp_path, "MistralForCausalLM")
    add_mistrals_format(base)
    with engine(base, adapter, tokenizer_mode="hf") as llm:
        outputs = llm.generate(real_prompts(4), greedy(), use_tqdm=False)
    assert_greedy_equals(outputs, load_reference(base, adapter))


def test_an_inner_model_embeds(tmp_path):
    base, adapter = make_pair(tmp_path, "Qwen3ForCausalLM")
    inner = tmp_path / "inner"
    AutoModel.from_pretrained(base).save_pretrained(inner)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, inner)
    prompts = real_prompts(3)
    with engine(inner, adapter) as llm:  # nothing says that it is to embed
        outputs = llm.embed(prompts, use_tqdm=False)
    model = load_reference(base, adapter)
    for output in outputs:
        with torch.no_grad():
            hidden = model.model(torch.tensor([output.prompt_token_ids])).last_hidden_state[0, -1]
        found = torch.tensor(output.outputs.embedding)
        torch.testing.assert_close(found, hidden / hidden.norm(), rtol=0, atol=1e-4)
