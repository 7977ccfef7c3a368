"""moecomm: stateless Mixture-of-Experts collectives that trace under torch.compile."""

__version__ = "0.1.0"
