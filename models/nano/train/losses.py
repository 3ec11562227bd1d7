"""Losses: answers, and dense heads that predict for each token its content and place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.models.nano.train.answer import SINK, THINGS
from qvl.models.nano.train.model import Nano
from qvl.models.nano.train.vision_input import MAX_TOKENS

NONE_WEIGHT = 0.25  # most patches show nothing


def answer_loss(model: Nano, hidden: Tensor, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, correct [number of answer tokens]). An answer weighs the square root of its length."""
    at = x["labels"] >= 0
    logits = F.linear(hidden[at], model.model.embed_tokens.weight).float()
    labels = x["labels"][at]
    loss = F.cross_entropy(logits, labels, reduction="none")
    weight = x["weight"][at]
    return (loss * weight).sum() / weight.sum(), logits.detach().argmax(-1) == labels


def corner_loss(model: Nano, hidden: Tensor, x: dict[str, Tensor]) -> Tensor:
    """Regression of boxes: digits alone are slow to teach that 199 and 201 are neighbours."""
    at = x["corners"][..., 0] >= 0
    if not bool(at.any()):
        return torch.zeros(())
    return F.smooth_l1_loss(model.aux.corners(hidden[at]).float(), x["corners"][at], beta=0.02) * 10


def look_loss(looks: list[Tensor], x: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Attention of one head in two layers, supervised to attend to the subject of the next token.

    A decoder this small finds "the red circle" among others only late by itself.
    """
    about, index = x["about"], x["vision_index"]
    at = about >= 0
    if not bool(at.any()):
        return torch.zeros(()), 0.0
    cover = torch.cat((x["cover"].flatten(0, 1), torch.zeros(1, x["cover"].shape[-1], dtype=torch.bool)))
    shows = cover[index]  # [b, prefix, things]; the last row, for -1, shows nothing
    sample, frames = at.nonzero()[:, 0], x["grid"].shape[0] // index.shape[0]
    frame = torch.where(index >= 0, index // MAX_TOKENS, -1) - torch.arange(len(index))[:, None] * frames
    here = frame[sample] == (about[at] // THINGS)[:, None]
    goal = (shows[sample, :, about[at] % THINGS] & here).float()
    found = goal.sum(1) > 0
    mass = [(look[at].float() * goal).sum(1)[found] for look in looks]
    return sum((-(m + 1e-3).log()).mean() for m in mass), float(mass[-1].detach().mean())


def among_loss(looks: list[Tensor], x: dict[str, Tensor]) -> Tensor:
    """The same head, supervised to attend to the middles of all counted things, or to all letters of a word.

    With twice the first token in a sum, what that token gets is 2 / (n + 2): the number can be read off.
    """
    at = x["among"] >= 0
    if not bool(at.any()):
        return torch.zeros(())
    bits, sample = x["among"][at], at.nonzero()[:, 0]
    index, frames = x["vision_index"], x["grid"].shape[0] // x["vision_index"].shape[0]
    first = torch.arange(len(index)) * frames  # the row of each sample's first picture
    local = torch.where(index >= 0, index - first[:, None] * MAX_TOKENS, -1)
    centre = x["centre"][first]  # [b, things]
    here = (local[:, :, None] == centre[:, None]).float()  # [b, prefix, things]
    wanted = (bits[:, None] >> torch.arange(THINGS)) & 1
    goal = (here[sample] @ wanted.float()[..., None])[..., 0]
    goal[:, 0] += 2 * ((bits & SINK) > 0)
    goal = goal / goal.sum(1, keepdim=True).clamp(min=1)
    entropy = -(goal * (goal + 1e-9).log()).sum(1)
    return sum((-(goal * (look[at].float() + 1e-3).log()).sum(1) - entropy).mean() for look in looks) + 0.0


def match_loss(model: Nano, matches: list[Tensor], middle: Tensor, x: dict[str, Tensor]) -> Tensor:
    """The second of two pictures: a head attends to the same place in the first, and each token tells
    after two layers whether it shows something else there.
    """
    at = x["match"] >= 0
    if not bool(at.any()):
        return torch.zeros(())
    shown = torch.stack((x["kind"], x["colour"]), -1).view(-1, MAX_TOKENS, 8).flatten(0, 1)
    before = x["vision_index"].gather(1, x["match"].clamp(min=0))
    changed = (shown[x["vision_index"][at]] != shown[before[at]]).any(-1).float()
    logits = model.aux.changed(model.aux.norm(middle[at]))[:, 0].float()
    loss = 2 * F.binary_cross_entropy_with_logits(logits, changed, pos_weight=torch.tensor(3.0))
    for look in matches:
        loss = loss - (look[at].gather(1, x["match"][at][:, None]).float() + 1e-3).log().mean()
    return loss


def _classes(logits: Tensor, target: Tensor) -> Tensor:
    weight = torch.ones(logits.shape[-1])
    weight[0] = NONE_WEIGHT
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), target.reshape(-1), weight)


def dense_loss(
    model: Nano, seen: Tensor, middle: Tensor, x: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    aux, (frames, tokens, _) = model.aux, seen.shape
    heads = aux.patch(aux.norm(seen)).view(frames, tokens * 4, -1).split(aux.classes, -1)
    names = ("kind", "colour", "char")
    parts = {n: _classes(h, x[n]) for n, h in zip(names, heads, strict=True) if bool((x[n] > 0).any())}
    with torch.no_grad():
        accuracy = {
            n: float((h.argmax(-1) == x[n])[x[n] > 0].float().mean())
            for n, h in zip(names, heads, strict=True)
            if bool((x[n] > 0).any())
        }
    k = torch.arange(tokens)
    row, col = k // x["grid"][:, 1:], k % x["grid"][:, 1:]
    centre = torch.stack((col, row, col, row), -1) + 0.5
    shown = x["shown"]
    if bool(shown.any()):
        parts["box"] = 2 * F.smooth_l1_loss(
            aux.box(aux.norm(seen))[shown].float(), (x["box"] - centre)[shown] / 2, beta=0.1
        )
        accuracy["box"] = float(parts["box"].detach())
    middle_of = torch.zeros(frames, tokens)
    rows = torch.arange(frames)[:, None].expand_as(x["centre"])[x["centre"] >= 0]
    middle_of[rows, x["centre"][x["centre"] >= 0]] = 1
    valid = k < x["grid"].prod(1, keepdim=True)
    logit = aux.centre(aux.norm(seen))[..., 0].float()
    parts["centre"] = F.binary_cross_entropy_with_logits(logit[valid], middle_of[valid])
    accuracy["centre"] = float(((logit > 0) == (middle_of > 0))[valid & (middle_of > 0)].float().mean())
    index = x["vision_index"]
    at = index >= 0
    flat = index[at]
    states = aux.norm(middle[at])
    logits = aux.place(states).float()
    parts["row"] = 0.5 * F.cross_entropy(logits[:, :13], row.flatten()[flat])
    parts["col"] = 0.5 * F.cross_entropy(logits[:, 13:], col.flatten()[flat])
    accuracy["row"] = float((logits[:, :13].argmax(-1) == row.flatten()[flat]).float().mean())
    accuracy["col"] = float((logits[:, 13:].argmax(-1) == col.flatten()[flat]).float().mean())
    ends = x["spans"][..., 0] > 0  # the token that closes a picture tells the size of its grid
    if bool(ends.any()):
        logits, size = aux.size(aux.norm(middle[ends])).float(), x["spans"][ends]
        parts["size"] = 0.3 * sum(F.cross_entropy(logits[:, a : a + 13], size[:, a // 13]) for a in (0, 13))
        accuracy["high"] = float((logits[:, :13].argmax(-1) == size[:, 0]).float().mean())
        accuracy["wide"] = float((logits[:, 13:].argmax(-1) == size[:, 1]).float().mean())
    inside = shown.flatten()[flat]
    if bool(inside.any()):
        goal = x["box"].flatten(0, 1)[flat][inside] / 4
        parts["absolute"] = 2 * F.smooth_l1_loss(aux.absolute(states[inside]).float(), goal, beta=0.1)
        accuracy["absolute"] = float(parts["absolute"].detach())
    return sum(parts.values(), torch.zeros(())), accuracy
