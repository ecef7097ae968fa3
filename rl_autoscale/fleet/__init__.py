"""The vocabulary: classes and SLOs, fleets, telemetry, decisions, the shield, and the control loop."""
