"""The decision process and its Gymnasium shells.

``import rl_autoscale.envs`` registers ``rl_autoscale/Fleet-v0`` (Gymnasium loads no plug-ins by itself since 1.0):

    import gymnasium as gym

    import rl_autoscale.envs

    env = gym.make("rl_autoscale/Fleet-v0", scenario="azure-conversation")
"""

from __future__ import annotations

FLEET_ENV_ID = "rl_autoscale/Fleet-v0"


def register_envs() -> None:
    """Register every environment of the package; calling it again changes nothing."""
    from gymnasium.envs.registration import register, registry

    if FLEET_ENV_ID not in registry:
        register(
            FLEET_ENV_ID,
            entry_point="rl_autoscale.envs.make:make_fleet_env",
            vector_entry_point="rl_autoscale.envs.make:make_fleet_vector_env",
        )


register_envs()
