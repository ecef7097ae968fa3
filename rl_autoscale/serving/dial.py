"""Turning the policy's dial while the controller runs: the configuration file's ``policy.knobs``, read again on change.

Attainment, price of a miss and weights of classes may change (`RegisteredPolicy.turn`): what the policy has seen of
the traffic stays. Anything else needs a restart. What became of an edit stands in one step's record.
"""

from __future__ import annotations

from rl_autoscale.fleet.protocols import Policy
from rl_autoscale.serving.config import PolicyChoice
from rl_autoscale.serving.modes import Reread


class Dial:
    """What the file asks of the policy.

    Args:
        choice: that the policy was made by.
        reread: what the file asks for now.
    """

    def __init__(self, choice: PolicyChoice, reread: Reread[PolicyChoice]) -> None:
        self._name, self._in_force = choice.name, choice.given
        self._reread = reread
        self._seen: tuple[PolicyChoice | None, str] = (None, "")
        self._answered: tuple[PolicyChoice | None, str] = self._seen

    def turn(self, policy: Policy) -> list[str]:
        """Turn the policy's dial if the file was changed; what to say of it in the step's record.

        An edit counts when two looks in a row have seen the same: a file may be read while it is being written.
        """
        seen, self._seen = self._seen, (self._reread(), self._reread.problem)
        if self._seen != seen or self._seen == self._answered:
            return []
        self._answered = self._seen
        asked, problem = self._seen
        if problem:
            return [f"dial not turned: {problem}"]
        if asked is None or (asked.name, asked.given) == (self._name, self._in_force):
            return []
        if asked.name != self._name:
            return [f"dial not turned: another policy, {asked.name}, needs a restart"]
        turn = getattr(policy, "turn", None)
        if turn is None:
            return [f"dial not turned: {policy.name} has none"]
        try:
            turn(asked.given)
        except Exception as error:  # whatever a policy raises, the fleet must be controlled
            return [f"dial not turned: {error}"]
        self._in_force = asked.given
        return [f"dial turned: {policy.name}"]
