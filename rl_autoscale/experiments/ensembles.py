"""Cocktail's ensembles: several models answer a question, and the majority decides.

For tasks with one right answer among few (classification, multiple choice): free text has no majority. A fleet serves
an ensemble as one class per model; a request becomes one per member, and its answer is there when the last vote is.

Cocktail (Gunasekaran et al., NSDI 2022, arXiv 2106.05345) weights votes by class and learns the weights online; here
every vote counts the same, since a simulator has no answers to learn from. Accuracies are the user's input. Votes of
models that were trained on the same text are not independent: ``common`` is the share of questions on which all of
them say the same, and there an ensemble is worth what a member is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.sim.layout import RecordArray
from rl_autoscale.workload.trace import BoolArray, Workload

MAX_MODELS = 12


def vote_accuracy(accuracies: Sequence[float], common: float = 0.0) -> float:
    """Probability that a majority vote is right; a tie is decided by a fair coin.

    Args:
        accuracies: of the members, each in [0, 1].
        common: share of questions on which all members give the same answer, right as often as their mean.

    Raises:
        SpecError: no member, or a number outside [0, 1].
    """
    given = np.asarray([*accuracies, common], dtype=np.float64)
    if len(accuracies) == 0 or not ((given >= 0.0) & (given <= 1.0)).all():
        raise SpecError(f"accuracies {list(accuracies)} and common={common} must be in [0, 1], one member at least")
    right = np.ones(1)  # probability of each number of right votes
    for accuracy in accuracies:
        right = np.convolve(right, [1.0 - accuracy, accuracy])
    votes, half = np.arange(len(right)), len(accuracies) / 2
    independent = float(right[votes > half].sum() + 0.5 * right[votes == half].sum())
    return common * float(np.mean(accuracies)) + (1.0 - common) * independent


def choose_members(
    accuracies: Mapping[str, float], price: Mapping[str, float], wanted: float, common: float = 0.0
) -> tuple[str, ...]:
    """The cheapest set of models whose vote is as good as wanted.

    Cocktail begins with all models and drops members while the accuracy holds, which misses sets where a weak voter
    does harm; of a dozen models every set can be tried.

    Args:
        accuracies: by model, at most MAX_MODELS.
        price: by model, of whatever is to be saved: GPU-seconds or dollars per request.
        wanted: accuracy of the vote.
        common: see `vote_accuracy`.

    Returns:
        The members, in the order given.

    Raises:
        SpecError: no set is as good as that, or there are too many models.
    """
    if len(accuracies) > MAX_MODELS:
        raise SpecError(f"{len(accuracies)} models are too many to try every set; give at most {MAX_MODELS}")
    sets = [members for size in range(1, len(accuracies) + 1) for members in combinations(accuracies, size)]
    votes = {members: vote_accuracy([accuracies[name] for name in members], common) for members in sets}
    enough = [members for members in sets if votes[members] >= wanted]
    if not enough:
        best = max(sets, key=lambda members: votes[members])
        raise SpecError(
            f"accuracy {wanted:g} is out of reach; the best set is {', '.join(best)} with {votes[best]:.3f}"
        )
    return min(enough, key=lambda members: sum(price[name] for name in members))


def fan_out(workload: Workload, members: Sequence[str]) -> Workload:
    """Every request once per member, side by side and at the same time; the classes are the members.

    Raises:
        SpecError: the prompts have prefix hashes, which are of one model's cache.
    """
    if workload.hash_ids is not None:
        raise SpecError("prompts with prefix hashes cannot be asked of several models; drop the hashes")
    copies = len(members)
    return replace(
        workload,
        arrival_s=np.repeat(workload.arrival_s, copies),
        prompt_tokens=np.repeat(workload.prompt_tokens, copies),
        output_tokens=np.repeat(workload.output_tokens, copies),
        class_index=np.tile(np.arange(copies, dtype=np.int16), workload.num_requests),
        class_names=tuple(members),
        session=None,
    )


def answered_in_time(requests: RecordArray, num_members: int) -> BoolArray:
    """Whether every vote of a question met its SLOs, shape (num_questions,).

    Args:
        requests: those of a `fan_out`, in its order.
        num_members: of the ensemble.
    """
    return np.asarray(requests["slo_met"].reshape(-1, num_members).all(axis=1))
