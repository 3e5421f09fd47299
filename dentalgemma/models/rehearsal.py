"""Sight for the small rehearsal model: its random vision tower learns to tell marks on phantoms apart, without words.

A real base comes with a trained tower, a random one hardly sees. Half a minute of dense supervision on phantoms of
their own seed gives tower and projector features worth reading; the language model stays random, so that all that is
ever said about teeth was learned in the stages.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModelForImageTextToText, ProcessorMixin

from data_builders.phantom import CONDITIONS, Phantom, make_phantoms
from dentalgemma.models.processors import load_processor

BATCH = 64
MARK_WEIGHT = 5.0  # most cells hold no mark
PLACE_WEIGHT = 0.1


def teach_tower(
    folder: Path, *, seed: int, phantoms: int = 1500, steps: int = 300, progress: bool = True
) -> dict[str, float]:
    """Train tower and projector of the small model in `folder` in place; returns what the last steps reached.

    For every image token the features must say which mark, if any, has its centre in the token's cell, and which cell
    it is. The head that is asked is thrown away.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = load_processor(folder)
    tokens = model.config.mm_tokens_per_image
    side = int(tokens**0.5)
    drawn = list(make_phantoms(phantoms, seed=seed))
    pixels = _pixels(drawn, processor)
    marks = torch.stack([_marks(phantom, side) for phantom in drawn])
    torch.manual_seed(seed)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    head = torch.nn.Linear(model.config.text_config.hidden_size, len(CONDITIONS) + tokens)
    parameters = [*tower.parameters(), *projector.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    rng = random.Random(seed)
    found = wanted = claimed = 0.0
    model.train()
    for step in track(range(steps), "Teaching the tower to see", console=Console(stderr=True), disable=not progress):
        chosen = rng.sample(range(phantoms), min(BATCH, phantoms))
        said = head(projector(tower(pixel_values=pixels[chosen]).last_hidden_state))
        truth, place = marks[chosen], torch.arange(tokens).repeat(len(chosen))
        weight = torch.tensor(MARK_WEIGHT)
        loss = binary_cross_entropy_with_logits(said[..., : len(CONDITIONS)], truth, pos_weight=weight)
        loss += PLACE_WEIGHT * cross_entropy(said[..., len(CONDITIONS) :].flatten(0, 1), place)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step >= steps * 0.9:
            seen = (said[..., : len(CONDITIONS)] > 0).float()
            found, wanted, claimed = (
                found + (seen * truth).sum().item(),
                wanted + truth.sum().item(),
                claimed + seen.sum().item(),
            )
    model.save_pretrained(folder)
    return {"recall": found / max(wanted, 1), "precision": found / max(claimed, 1)}


def _pixels(phantoms: list[Phantom], processor: ProcessorMixin) -> torch.Tensor:
    pictures = [phantom.image.convert("RGB") for phantom in phantoms]
    return torch.as_tensor(processor.image_processor(pictures, return_tensors="pt")["pixel_values"])


def _marks(phantom: Phantom, side: int) -> torch.Tensor:
    """Which cell of a `side` by `side` grid holds the centre of which condition: (cells, conditions) of 0 and 1."""
    marks = torch.zeros(side * side, len(CONDITIONS))
    for finding in phantom.findings:
        left, top, right, bottom = finding.bounds or (0, 0, 0, 0)
        column, row = (min(int((a + b) / 2 * side), side - 1) for a, b in ((left, right), (top, bottom)))
        marks[row * side + column, CONDITIONS.index(finding.label)] = 1
    return marks
