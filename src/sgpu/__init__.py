"""sgpu: advertise each NVIDIA GPU of a Kubernetes node as many shared devices."""

__version__ = "0.1.0"
