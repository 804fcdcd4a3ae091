"""What a model in training makes of a prompt."""

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def continue_prompt(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """Continue a prompt greedily, reading everything again for each token: no cache, which a model in training lacks.

    Args:
        model: a causal language model.
        prompt: token ids, [T].
        tokens: how many to add.
    Returns:
        Prompt and continuation, [T + tokens] on the CPU.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=16)).eval()
        >>> continue_prompt(model, torch.tensor([1, 2]), 3).shape
        torch.Size([5])
    """
    ids = prompt[None].to(next(model.parameters()).device)
    for _ in range(tokens):
        logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0].cpu()
