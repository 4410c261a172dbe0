"""ACM, Activation-Guided Consensus Merging (arXiv 2505.14009, NeurIPS 2025): the delta shrinks by layer.

The more the outputs of a layer of the merged model have in common with the base's, the less of the merged delta the
layer takes:

    W = W0 + (1 - t) * (Wm - W0)        for every weight and bias of a layer

m_i is the mutual information between the two models' outputs of the layer's MLP for calibration text i, in nats.

    normalise samples    t = mean over texts of sigmoid(theta * (m_i - max_j m_j)), the maximum over the layer's texts
    normalise layers     t = sigmoid(theta * (M - max M)), M a layer's mean m_i, the maximum over the layers

Embedding, final norm and output head are groups of their own, always by `samples`. t lies in (0, 0.5].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lowmem_aim.recipe.words import Normalise

EMBEDDING, NORM, HEAD = "embedding", "norm", "lm_head"  # the groups beside the layers, which are called "0", "1", ...


def freezing(
    information: Mapping[str, Sequence[float]],  # group -> m_i of each text
    theta: float,
    normalise: Normalise,
) -> dict[str, float]:  # group -> t
    """t of the formula for each group: the share of the delta that the group does not take."""
    means = {group: math.fsum(m) / len(m) for group, m in information.items()}
    top = max((mean for group, mean in means.items() if group.isdecimal()), default=0.0)
    return {
        group: _sigmoid(theta * (means[group] - top))
        if normalise == "layers" and group.isdecimal()
        else math.fsum(_sigmoid(theta * (m - max(of_texts))) for m in of_texts) / len(of_texts)
        for group, of_texts in information.items()
    }


def _sigmoid(x: float) -> float:
    """Sigmoid of x <= 0, for which exp cannot overflow."""
    power = math.exp(x)
    return power / (1.0 + power)
