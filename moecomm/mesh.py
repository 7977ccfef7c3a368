"""Device meshes of a Mixture-of-Experts model: one world of ranks in two views, dense and expert."""

from moecomm.parallel.mesh import MoEMesh, divisors, layout, moe_mesh

__all__ = ["MoEMesh", "divisors", "layout", "moe_mesh"]
