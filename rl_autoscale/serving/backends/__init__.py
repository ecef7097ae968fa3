"""Back ends: whoever starts and stops replicas. Each is one module with one class; see `serving.protocols.Backend`."""
