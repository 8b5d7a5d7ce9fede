"""How much of a network with parallel branches can be cut, unfolded and folded.

`PYTHONPATH=src:bench python bench/reparameterize.py` writes results/reparameterize.csv, which
docs/how_to/reuse_a_pruned_network.md shows: images of 224×224, 1,000 classes, `prune_residual` off.
"""

from __future__ import annotations

import torch
from torch import nn

from rows import ROOT
from secateur.graph.build import build_dependency_graph
from secateur.models import zoo
from secateur.models.divergence import relative_error
from secateur.models.reparameterize import reparameterized

NETWORKS = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9")


def least_fraction(model: nn.Module, images: torch.Tensor) -> float:
    """Return the fraction of the MACs that remains with one filter of every group."""
    dependencies = build_dependency_graph(model, images)
    removed = {name: tuple(range(1, len(group))) for name, group in dependencies.groups.items()}
    return dependencies.macs(removed) / dependencies.macs()


def main() -> None:
    """Write a row a network."""
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rows = ["network,least_fraction_unfolded,least_fraction_folded,relative_error"]
    for name in NETWORKS:
        model = zoo.load(f"timm:{name}", num_classes=1000)
        folded = reparameterized(model)
        with torch.no_grad():
            error = relative_error(folded(images), model(images))
        unfolded, fraction = (least_fraction(network, images) for network in (model, folded))
        rows.append(f"{name},{unfolded:.4f},{fraction:.4f},{error:.1e}")
        print(rows[-1], flush=True)
    (ROOT / "results" / "reparameterize.csv").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
