"""Turning the policy's dial while the controller runs: the configuration file's ``policy.knobs``, read again on change.

Attainment, price of a miss and weights of classes may change (`RegisteredPolicy.turn`): what the policy has seen of
the traffic stays. Anything else needs a restart, and each step's record says so once.
"""

from __future__ import annotations

from collections.abc import Callable

from rl_autoscale.fleet.errors import RlAutoscaleError
from rl_autoscale.fleet.protocols import Policy
from rl_autoscale.serving.config import PolicyChoice


class Dial:
    """What the file asks of the policy.

    Args:
        choice: that the policy was made by.
        reread: gives what the file asks for now; None while it is as it was.
    """

    def __init__(self, choice: PolicyChoice, reread: Callable[[], PolicyChoice | None]) -> None:
        self._choice, self._name = choice, choice.name
        self._reread = reread

    def turn(self, policy: Policy) -> list[str]:
        """Turn the policy's dial if the file was changed; what to say of it in the step's record."""
        asked = self._reread()
        if asked is None or asked == self._choice:
            return []
        self._choice = asked
        if asked.name != self._name:
            return [f"dial not turned: another policy, {asked.name}, needs a restart"]
        turn = getattr(policy, "turn", None)
        if turn is None:
            return [f"dial not turned: {policy.name} has none"]
        try:
            turn(asked.given)
        except (RlAutoscaleError, TypeError) as error:  # TypeError: a knob that it has not
            return [f"dial not turned: {error}"]
        return [f"dial turned: {policy.name}"]
