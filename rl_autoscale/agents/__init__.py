"""Every policy: hand-written rules, the clairvoyant planner, and what is learned."""
