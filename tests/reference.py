"""Slow, literal references of the equations. They live in the tests only, and share no code with the package."""

from __future__ import annotations

import torch


def literal_attribution(model, tokenizer, prompt, target, template, steps=20, layers=None):
    """Eq. 3-5 word by word for a fact in words."""
    full = tokenizer(f"{prompt} {target}")["input_ids"]
    return literal_attribution_of_ids(model, full, len(tokenizer(prompt)["input_ids"]), template, steps, layers)


def literal_attribution_of_ids(model, ids, n_prompt, template, steps=20, layers=None):
    """Eq. 3-5 word by word: a full forward pass for every layer, answer token and step."""
    full = torch.tensor([list(ids)], device=next(model.parameters()).device)
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
    handle = module.register_forward_hook(lambda m, a, out: seen.append(_rows(out)[-1].detach().clone()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0]


def answer_probability(model, module, ids, answer, value):
    """P(answer | ids) with the module's output at the last position replaced by ``value`` (Eq. 3)."""

    def put(m, a, out):
        out = out.clone()
        _rows(out)[-1] = value
        return out

    handle = module.register_forward_hook(put)
    try:
        return torch.softmax(model(input_ids=ids).logits[0, -1], -1)[answer]
    finally:
        handle.remove()


def _rows(out):
    """What a module gives for one text, ``(positions, d2)``: some leave the batch's dimension out, or have one more."""
    return out.view(-1, out.shape[-1])


def literal_row_training(
    model,
    examples,
    masks,
    lr,
    steps,
    alpha=1.0,
    weight_decay=0.0,
    stop_loss=0.0,
    kl_weight=0.0,
    kl_texts=(),
    kl_per_step=0,
    fraction=None,
    projectors=None,
):
    """Eq. 8-11 on full matrices: every weight has a full-sized ``W_kne`` whose gradient is masked to the chosen rows.

    ``examples`` are (token ids, number of prompt tokens), each run through the model alone and unpadded;
    ``masks`` maps parameter name -> (boolean mask of the weight's shape, number of chosen neurons ``n``);
    ``kl_texts`` are (token ids, number of prompt tokens): ``kl_weight`` times the mean KL divergence, before against
    now, of the distributions that predict the tokens after the prompts is added to what is minimised. ``kl_per_step``:
    only of so many texts in each step, in turn.
    ``projectors``: parameter name -> ``P``, ``(d1, d1)``, by which gradients and AdamW's steps are multiplied.
    ``fraction``: instead of AdamW, Polyak's step with that fraction, on what is added to the weights itself.
    Returns what is added to each weight, full-sized, and the answers' losses before every step and after the last.
    """
    frozen = {name: parameter.detach() for name, parameter in model.named_parameters()}
    added = {name: torch.zeros_like(frozen[name], requires_grad=True) for name in masks}

    def scaled():
        factor = {name: alpha / masks[name][1] ** 0.5 if fraction is None else 1.0 for name in masks}
        return {name: factor[name] * added[name] for name in masks}

    def logits_of(ids):
        edited = {**frozen, **{name: frozen[name] + change for name, change in scaled().items()}}
        return torch.func.functional_call(model, edited, kwargs={"input_ids": torch.tensor([list(ids)])}).logits[0]

    def loss():
        total, count = 0, 0
        for ids, n_prompt in examples:
            logits = logits_of(ids)
            for position in range(n_prompt, len(ids)):
                total = total - torch.log_softmax(logits[position - 1], -1)[ids[position]]
                count += 1
        return total / count

    def distributions(text):
        ids, n_prompt = kl_texts[text]
        return torch.softmax(logits_of(ids[:-1])[n_prompt - 1 :], -1)

    def divergence(step):
        total, count = 0, 0
        for i in range(kl_per_step or len(kl_texts)):
            text = (step * kl_per_step + i) % len(kl_texts)
            for p, q in zip(before[text], distributions(text)):
                total = total + (p * torch.log(p / q)).sum()
                count += 1
        return total / count

    before = [distributions(text).detach() for text in range(len(kl_texts))]
    optimizer = torch.optim.AdamW(added.values(), lr=lr, weight_decay=weight_decay)
    losses = []
    while True:
        now = loss()
        losses.append(now.item())
        if losses[-1] < stop_loss or len(losses) > steps:
            return {name: change.detach() for name, change in scaled().items()}, losses
        optimizer.zero_grad()
        minimised = now + kl_weight * divergence(len(losses) - 1) if kl_texts else now
        minimised.backward()
        for name, (mask, _) in masks.items():
            added[name].grad[~mask] = 0
        moves = {name: change.grad @ projectors[name] if projectors else change.grad for name, change in added.items()}
        if fraction is None:
            unmoved = {name: change.detach().clone() for name, change in added.items()}
            for name, change in added.items():
                change.grad.copy_(moves[name])
            optimizer.step()
            with torch.no_grad():
                for name, change in added.items() if projectors else ():
                    change.copy_(unmoved[name] + (change - unmoved[name]) @ projectors[name])
        else:
            norms = {name: move.square().sum().sqrt() for name, move in moves.items()}
            slope = sum((added[name].grad * move).sum() / norms[name] for name, move in moves.items())
            with torch.no_grad():
                for name, change in added.items():
                    change -= fraction * minimised / slope * moves[name] / norms[name]


def literal_continuation(model, ids, tokens, end=None):
    """The tokens that the model says after ``ids``, each by a pass over all before it."""
    said = []
    while len(said) < tokens and end not in said:
        with torch.no_grad():
            said.append(model(input_ids=torch.tensor([[*ids, *said]])).logits[0, -1].argmax().item())
    return said


def literal_projector(model, name, texts, ridge):
    """``I - X^T (X X^T + lambda I)^-1 X`` by an explicit inverse.

    ``X`` are the inputs of a module at every token of the texts, each beginning of a text once; ``lambda`` is the ridge
    times the median of their squared norms.
    """
    inputs, seen = [], set()
    for text in texts:
        found = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args, found=found: found.append(args[0]))
        with torch.no_grad():
            model(input_ids=torch.tensor([text]))
        handle.remove()
        for end in range(len(text)):
            if tuple(text[: end + 1]) not in seen:
                seen.add(tuple(text[: end + 1]))
                inputs.append(found[0].view(len(text), -1)[end])
    x = torch.stack(inputs)
    squares = sorted(row.square().sum().item() for row in x)
    middle = squares[(len(squares) - 1) // 2]  # of two middle ones the smaller, as torch has it
    inverse = torch.linalg.inv(x @ x.T + ridge * middle * torch.eye(len(x)))
    return torch.eye(x.shape[1]) - x.T @ inverse @ x
