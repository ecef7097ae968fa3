"""The simulated fleet: a compiled engine that leaps, and a SimPy reference it is tested against."""
