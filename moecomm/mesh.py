"""Device meshes of a Mixture-of-Experts model: one world of ranks as a dense mesh and as an expert mesh."""

from moecomm.parallel.mesh import MoEMesh, divisors, layout, moe_mesh

__all__ = ["MoEMesh", "divisors", "layout", "moe_mesh"]
