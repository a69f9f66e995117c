"""Slow, literal references of the equations. They live in the tests only, and share no code with the package."""

from __future__ import annotations

import torch


def literal_attribution(model, tokenizer, prompt, target, template, steps=20, layers=None):
    """Eq. 3-5 word by word: a full forward pass for every layer, answer token and step."""
    full = tokenizer(f"{prompt} {target}", return_tensors="pt")["input_ids"]
    n_prompt = len(tokenizer(prompt)["input_ids"])
    n_layers = model.config.num_hidden_layers
    result = []
    for layer in range(n_layers) if layers is None else layers:
        module = model.get_submodule(template.format(layer))
        total = 0
        for position in range(n_prompt - 1, full.shape[1] - 1):
            ids, answer = full[:, : position + 1], full[0, position + 1]
            clean = neuron_value(model, module, ids)
            for step in range(1, steps + 1):
                point = (clean * (step / steps)).requires_grad_()
                probability = answer_probability(model, module, ids, answer, point)
                total = total + clean * torch.autograd.grad(probability, point)[0] / steps
        result.append(total)
    return torch.stack(result)


def neuron_value(model, module, ids):
    """The module's output at the last position of ``ids``, ``(d2,)``."""
    seen = []
    handle = module.register_forward_hook(lambda m, a, out: seen.append(out[0, -1].detach().clone()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0]


def answer_probability(model, module, ids, answer, value):
    """P(answer | ids) with the module's output at the last position replaced by ``value`` (Eq. 3)."""

    def put(m, a, out):
        out = out.clone()
        out[0, -1] = value
        return out

    handle = module.register_forward_hook(put)
    try:
        return torch.softmax(model(input_ids=ids).logits[0, -1], -1)[answer]
    finally:
        handle.remove()
