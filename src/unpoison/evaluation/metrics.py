"""The metrics as pure functions of NumPy arrays. Rates are shares in [0, 1]; higher score = more suspicious.

y: true labels; t: the attack's label of each sample (the target; all-to-all: the matched label); T: the trigger.
No rate of no samples exists: the functions raise NotEnoughDataError, the detection metrics give None.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from unpoison.errors import ConfigError, NotEnoughDataError

Predictions = Int[np.ndarray, " n"]
Flags = Bool[np.ndarray, " n"]
Scores = Float[np.ndarray, " n"]


def accuracy(predictions: Predictions, labels: Predictions) -> float:
    """C-Acc = mean[f(x) = y] on clean test samples."""
    return _share(predictions == labels, "samples")


def asr(triggered: Predictions, attack_labels: Predictions, labels: Predictions) -> float:
    """ASR = mean[f(T(x)) = t] over {x : y != t}: the target class is excluded, always."""
    counted = labels != attack_labels
    return _share(triggered[counted] == attack_labels[counted], "samples outside the target class")


def asr_floor(clean: Predictions, attack_labels: Predictions, labels: Predictions) -> float:
    """mean[f(x) = t] over {x : y != t}: what the same model sends to t *without* the trigger."""
    return asr(clean, attack_labels, labels)


def excess_asr(rate: float, floor: float) -> float:
    """max(0, ASR - floor), in the unit of both."""
    return max(0.0, rate - floor)


def robust_accuracy(triggered: Predictions, attack_labels: Predictions, labels: Predictions) -> float:
    """RA = mean[f(T(x)) = y] over {x : y != t}. A low ASR with a low RA means destroyed, not repaired."""
    counted = labels != attack_labels
    return _share(triggered[counted] == labels[counted], "samples outside the target class")


def der(*, c_acc_before: float, c_acc_after: float, asr_before: float, asr_after: float) -> float:
    """DER = [max(0, ASR fall) - max(0, C-Acc fall) + 1] / 2 in [0, 1]; 1 is a perfect repair. Shares in [0, 1]."""
    return (max(0.0, asr_before - asr_after) - max(0.0, c_acc_before - c_acc_after) + 1) / 2


def auroc(scores: Scores, poisoned: Flags) -> float | None:
    """Area under the ROC curve, poison positive; None where one side is missing (it is undefined at rate 0)."""
    scores, poisoned = _finite(scores, poisoned)
    return float(roc_auc_score(poisoned, scores)) if _both(poisoned) else None


def pr_auc(scores: Scores, poisoned: Flags) -> float | None:
    """Average precision, poison positive; None where one side is missing."""
    scores, poisoned = _finite(scores, poisoned)
    return float(average_precision_score(poisoned, scores)) if _both(poisoned) else None


def tpr_at_fpr(scores: Scores, poisoned: Flags, fpr: float = 0.05) -> float | None:
    """Largest share of the poison over a threshold that at most ``fpr`` of the clean samples reach; None as above."""
    if not 0 <= fpr <= 1:
        raise ConfigError(f"fpr must be in [0, 1], got {fpr}.", hint="0.05 is 5 %.")
    scores, poisoned = _finite(scores, poisoned)
    if not _both(poisoned):
        return None
    false_rates, true_rates, _ = roc_curve(poisoned, scores, drop_intermediate=False)
    return float(true_rates[false_rates <= fpr].max())


def recall(flagged: Flags, poisoned: Flags) -> float | None:
    """Share of the poison that is flagged; None without poison."""
    return float(flagged[poisoned].mean()) if poisoned.any() else None


def precision(flagged: Flags, poisoned: Flags) -> float | None:
    """Share of the flagged that is poison; None where nothing is flagged."""
    return float(poisoned[flagged].mean()) if flagged.any() else None


def false_positive_rate(flagged: Flags, poisoned: Flags) -> float | None:
    """Share of the clean samples that is flagged: the figure to report at poisoning rate 0. None without any."""
    return float(flagged[~poisoned].mean()) if not poisoned.all() else None


def purity_per_class(labels: Predictions, trusted: Flags, poisoned: Flags, classes: int) -> list[float | None]:
    """Share of each given label's trusted samples that is not poison; None for a label without any."""
    of_class = [trusted & (labels == label) for label in range(classes)]
    return [float((~poisoned[rows]).mean()) if rows.any() else None for rows in of_class]


def _share(hits: np.ndarray, what: str) -> float:
    if len(hits) == 0:
        raise NotEnoughDataError(what, have=0, need=1, hint="Evaluate on samples of other classes too.")
    return float(hits.mean())


def _finite(scores: Scores, poisoned: Flags) -> tuple[np.ndarray, np.ndarray]:
    """Without skipped rows, whose score is NaN."""
    usable = ~np.isnan(scores)
    return scores[usable], poisoned[usable]


def _both(poisoned: np.ndarray) -> bool:
    return bool(poisoned.any() and not poisoned.all())
