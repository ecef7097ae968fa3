"""The live fleet: telemetry, gateway, controller and back ends. Nothing is here yet; see Status in the README."""
