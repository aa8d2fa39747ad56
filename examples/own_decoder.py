"""A speculative decoder of one's own, for any Llama of transformers: `python examples/own_decoder.py [MODEL] [PROMPT]`.

An n-gram table proposes a tree, one forward checks all of it, the cache keeps the path that the model itself draws; the
answer is compared with `generate` at the end. Without a model a tiny random one is made: it talks nonsense, fast.
"""

import sys

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specvlm_kernels import accept, compact_kv, pack_ancestors, tree_attention, write_kv

NODES, DEPTH, NEW_TOKENS = 16, 6, 100


def propose(tokens: list[int]) -> tuple[list[int], list[int]]:
    """The root, and what followed the last tokens when they were seen before: a tree's tokens and parents."""
    nodes, parents, children = [tokens[-1]], [-1], {}
    for n in (3, 2, 1):
        for end in range(len(tokens) - 1, n - 1, -1):
            node = 0
            for token in tokens[end : end + DEPTH] if tokens[end - n : end] == tokens[-n:] else ():
                if (node, token) not in children:
                    if len(nodes) == NODES:
                        return nodes, parents
                    children[node, token] = len(nodes)
                    nodes.append(token)
                    parents.append(node)
                node = children[node, token]
    return nodes, parents


def forward(
    model: LlamaForCausalLM, tokens: Tensor, parents: Tensor, slab: Tensor, kv_len: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [1, N, V] and positions [1, N] of a tree whose root is the next token; its KV goes behind the cached."""
    body, ancestors = model.model, pack_ancestors(parents)
    bits = (ancestors[..., None] >> torch.arange(64, device=tokens.device)) & 1
    positions = kv_len + bits.flatten(2).sum(-1) - 1  # a node lies as deep as it has ancestors
    x = body.embed_tokens(tokens)
    cos, sin = body.rotary_emb(x, positions)
    for layer, (k_cache, v_cache) in zip(body.layers, slab, strict=True):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (project(h).unflatten(-1, (-1, slab.shape[-1])).transpose(1, 2) for project in projections)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        write_kv(k_cache, v_cache, k, v, kv_len)
        x = x + attention.o_proj(tree_attention(q.transpose(1, 2), k_cache, v_cache, kv_len, ancestors).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(body.norm(x)), positions


@torch.inference_mode()
def decode(model: LlamaForCausalLM, prompt: list[int], new_tokens: int) -> tuple[list[int], int]:
    """The greedy answer, at most `new_tokens` long and EOS included, and how many rounds it took."""
    config, device, ends = model.config, model.device, model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    capacity, head_dim = len(prompt) + new_tokens + NODES, model.model.layers[0].self_attn.head_dim
    shape = (config.num_hidden_layers, 2, 1, config.num_key_value_heads, capacity, head_dim)
    slab = torch.zeros(shape, dtype=model.dtype, device=device)
    kv_len = torch.zeros(1, dtype=torch.int32, device=device)

    chain = torch.arange(-1, len(prompt) - 1, dtype=torch.int32, device=device)[None]  # a prompt is a tree, too
    logits, _ = forward(model, torch.tensor([prompt], device=device), chain, slab, kv_len)
    answer, rounds = [int(logits[0, -1].argmax())], 0
    kv_len += len(prompt)
    while len(answer) < new_tokens and not ends.intersection(answer):
        nodes, above = propose(prompt + answer)
        tokens, parents = torch.tensor([nodes], device=device), torch.tensor([above], dtype=torch.int32, device=device)
        logits, positions = forward(model, tokens, parents, slab, kv_len)
        walk = accept(logits, tokens, parents, positions)
        compact_kv(slab, kv_len, walk.path, walk.length)
        kv_len += 1 + walk.length
        *path, bonus = torch.cat([walk.path[0], walk.next_token]).tolist()  # the round's one wait for the device
        answer += [*(nodes[node] for node in path if node >= 0), bonus]
        rounds += 1
    stop = next((i + 1 for i, token in enumerate(answer) if token in ends), new_tokens)
    return answer[: min(stop, new_tokens)], rounds


def tiny_llama() -> LlamaForCausalLM:
    """A random model of 2 layers, 4 heads of 32 and 2 key-value heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 320}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def main(arguments: list[str]) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompt = torch.randint(3, 320, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    model, tokenizer = tiny_llama().to(device), None
    if arguments:  # fp32: in bf16 a product over a tree may round otherwise than one over a row, and a near-tie flips
        model = LlamaForCausalLM.from_pretrained(arguments[0], dtype=torch.float32).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(arguments[0])
        prompt = tokenizer(" ".join(arguments[1:]) or "Once upon a time")["input_ids"]
    answer, rounds = decode(model, prompt, NEW_TOKENS)
    inputs = torch.tensor([prompt], device=device)
    mask = torch.ones_like(inputs)
    expected = model.generate(inputs, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS)
    print(tokenizer.decode(answer) if tokenizer else answer)
    print(f"{len(answer)} tokens, {(len(answer) - 1) / max(rounds, 1):.2f} a round")  # the first came with the prompt
    equal = answer == expected[0, len(prompt) :].tolist()
    print("equal to generate" if equal else "NOT equal to generate")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
