"""train.py with the errors of the released mask sampler: what do they cost?

    python tests/benchmark/released_masks.py --model vit_nano --data shapes --steps 500

The options are those of train.py, and nothing else differs. Written from a description of what the
released sampler does, for the row "masks" of `ablations.py`:

    1. A position is drawn below, not up to, the last one that fits, and a block that fills the
       grid is made smaller by one. So the last row and column are never context nor target, and
       the context block, which is nearly as large as the grid, is always in the top left corner.
    2. One random number gives both scale and aspect ratio of a target: few shapes.
    3. The contexts of a batch are cut to the shortest of them, and keep their first patches in
       raster order: the lower part of the picture is lost, and more so in larger batches.

The held-out loss is not to be compared with train.py's: its masks have these errors too. Accuracy
is, since encoders see whole pictures there.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from data import run_script
from ijepa import MaskCollator


class ReleasedMasks(MaskCollator):
    """`MaskCollator` with errors 1 to 3; the arguments are the same.

    Raises ValueError for what has no block to place, and for a context size, which the batch sets.
    """

    def __init__(self, grid, strategy: str = "multiblock", **more):
        if strategy != "multiblock":
            raise ValueError(f"the released sampler has no masks {strategy!r}: use train.py")
        super().__init__(grid, strategy, **more)
        # Rows are pairs of one of n scales and one of n aspect ratios: here, the i-th of both.
        n = round(len(self.target_shapes) ** 0.5)
        most = torch.tensor(self.grid) - 1
        self.target_shapes = self.target_shapes[:: n + 1].minimum(most)  # (n, 2)
        self.context_shapes = self.context_shapes.minimum(most)  # (S, 2)

    def _choose_context_size(self, wanted: int | None, share: float) -> int:
        """The fewest patches that a picture may be left with; the batch cuts all to its fewest."""
        if wanted is not None:
            raise ValueError("the released sampler has the context that the batch leaves")
        return 1

    def _place(self, height, width, size, generator):
        """Top left corners, uniform over all places but the last row and column of them."""
        top, left = torch.rand(2, *size, generator=generator)
        rows, columns = self.grid
        return (top * (rows - height)).long(), (left * (columns - width)).long()

    def _reduce(self, free: Tensor, generator) -> Tensor:
        """What the batch leaves: (B, N) bool -> (B, K)."""
        return first_of_each(free)


def first_of_each(free: Tensor) -> Tensor:
    """The first K patches of each row, K being the fewest in a row: (B, N) bool -> (B, K)."""
    shortest = int(free.sum(1).min())
    kept = free & (free.cumsum(1) <= shortest)
    return kept.nonzero()[:, 1].view(len(free), shortest)


def main() -> None:
    train.MaskCollator = ReleasedMasks
    train.main()


if __name__ == "__main__":
    run_script(main)
