"""Sampling one row in numpy, with sorting and in float64."""

import numpy as np

from engine.request import SamplingParams


def allowed_probabilities(
    logits_V: np.ndarray,
    params: SamplingParams,
    *,
    prompt: list[int],
    output: list[int],
    end_token_ids: tuple[int, ...] = (),
) -> np.ndarray:
    """The distribution that is drawn from, zero for tokens that the limits exclude."""
    logits_V = logits_V.astype(np.float64)
    for token, bias in params.logit_bias.items():
        logits_V[token] += bias
    if len(output) < params.min_tokens:
        logits_V[list(end_token_ids)] = -1e30
    counts_V = np.bincount(output, minlength=len(logits_V))
    seen_V = (counts_V > 0) | (np.bincount(prompt, minlength=len(logits_V)) > 0)
    factor = params.repetition_penalty
    repeated_V = np.where(logits_V > 0, logits_V / factor, logits_V * factor)
    logits_V = np.where(seen_V, repeated_V, logits_V)
    logits_V -= params.frequency_penalty * counts_V
    logits_V -= params.presence_penalty * (counts_V > 0)
    if params.temperature == 0:
        return (np.arange(len(logits_V)) == np.argmax(logits_V)).astype(np.float64)

    weight_V = np.exp((logits_V - logits_V.max()) / params.temperature)
    weight_V[weight_V < params.min_p * weight_V.max()] = 0
    if params.top_k > 0:
        kth = np.sort(weight_V)[-min(params.top_k, len(weight_V))]
        weight_V[weight_V < kth] = 0
    if params.top_p < 1:
        descending = np.sort(weight_V)[::-1]
        count = np.searchsorted(np.cumsum(descending), params.top_p * descending.sum()) + 1
        weight_V[weight_V < descending[min(count, len(weight_V)) - 1]] = 0
    return weight_V / weight_V.sum()
