"""Beam search: the most probable pronunciation of each spelling."""

import torch
from data import BOS, EOS, PAD, Pronunciation, spell
from model import Speaker
from torch import Tensor


@torch.inference_mode()
def pronounce(model: Speaker, spellings: list[str], symbols: tuple[str, ...], beams: int, chunk: int = 256) -> list[Pronunciation]:
    """The best of ``beams`` hypotheses for every spelling, in the order given."""
    model.eval()
    device = next(model.parameters()).device
    by_length = sorted(range(len(spellings)), key=lambda i: len(spellings[i]))
    found: dict[int, Pronunciation] = {}
    for start in range(0, len(by_length), chunk):
        rows = by_length[start : start + chunk]
        letters, lengths = spell([spellings[i] for i in rows])
        for i, numbers in zip(rows, _search(model, letters.to(device), lengths.to(device), beams).tolist(), strict=True):
            found[i] = tuple(symbols[number] for number in numbers if number not in (PAD, BOS, EOS))
    return [found[i] for i in range(len(spellings))]


def _search(model: Speaker, letters: Tensor, lengths: Tensor, beams: int) -> Tensor:
    """Phonemes ``[B, N]`` of the best hypothesis, up to EOS, then padding.

    The ``K`` hypotheses of a word are ``K`` queries over its one memory, which is never copied.
    """
    memory, state = model.encode(letters, lengths)
    words = len(lengths)
    state = state.repeat_interleave(beams, dim=1)  # [1, B * K, H]
    history = torch.full((words, beams, 1), BOS, device=letters.device)
    scores = torch.full((words, beams), float("-inf"), device=letters.device)
    scores[:, 0] = 0.0  # all hypotheses are still the same one
    ended = torch.zeros_like(scores, dtype=torch.bool)
    only_pad = torch.full((model.output.out_features,), float("-inf"), device=letters.device)
    only_pad[PAD] = 0.0
    for _ in range(2 * letters.shape[1] + 8):
        queries, state = model.advance(history[:, :, -1].reshape(-1, 1), state)
        logits, _ = model.predict(queries.view(words, beams, -1), memory)
        gains = torch.where(ended[..., None], only_pad, logits.log_softmax(-1))
        scores, choice = (scores[..., None] + gains).flatten(1).topk(beams)
        parent, phoneme = choice // gains.shape[-1], choice % gains.shape[-1]
        history = torch.cat((_of_parents(history, parent), phoneme[..., None]), -1)
        state = _of_parents(state.view(words, beams, -1), parent).view(1, words * beams, -1)
        ended = (phoneme == EOS) | (phoneme == PAD)
        if ended.all():
            break
    return history[:, 0]


def _of_parents(rows: Tensor, parent: Tensor) -> Tensor:
    """From ``[B, K, N]`` the rows ``[B, K]`` that the surviving hypotheses came from."""
    return rows.gather(1, parent[..., None].expand(-1, -1, rows.shape[-1]))
