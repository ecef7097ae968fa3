"""The live fleet: telemetry, gateway, controller and back ends (docs/live.md)."""
