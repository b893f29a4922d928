"""Where introns begin and end in DNA: residual dilated convolutions, 10,000 bases around."""

import gzip

import numpy as np
from legacy import load_legacy_h5

from real.case import Case

CONTEXT = 5000  # bases on each side of a place
SITE = 0.1  # the original's score from which a place counts as a site
BASES = "ACGT"
WINDOW = 5000  # places that one run scores
ACCEPTOR, DONOR = 1, 2


class SpliceAI(Case):
    """The first of five models, on both strands of 50,000 bases of chromosome 10.

    Training inputs and test inputs share no base: the first half of the bases is for training.
    Nearly all places are no site, and the few sites have most of the sum of all scores. The metric
    is an F1 score without a threshold: what the scores have in common with the original's, over
    the mean of both sums. Sites that fade count, and so do sites that appear.
    """

    name = "spliceai"
    requirement = "spliceai==1.3.1"
    metric = "soft F1 against the original's sites"
    also = f"mean score at the sites, where the original's is above {SITE:g}"
    calibration = 10
    training = 200
    input_shapes = (1, WINDOW + 2 * CONTEXT, len(BASES))

    def load(self):
        return load_legacy_h5(self.folder / "spliceai/models/spliceai1.h5")

    def training_inputs(self, count):
        first, _ = self._halves()
        return self._windows(first, count)

    def test(self):
        _, second = self._halves()
        return self._windows(second, 2 * (len(second) // WINDOW)), None

    def scores(self, outputs, original, labels):
        scores, expected = outputs[..., ACCEPTOR:], original[..., ACCEPTOR:]
        soft_f1 = 2 * np.minimum(scores, expected).sum() / (scores.sum() + expected.sum())
        return soft_f1, scores[expected > SITE].mean()

    def _halves(self):
        """The known bases in two halves, as numbers, where -1 is none."""
        with gzip.open(self.sources.real("chr10_50kb.fa.gz"), "rt") as file:
            next(file)
            text = file.read().replace("\n", "").upper().strip("N")
        return np.split(np.array([BASES.find(base) for base in text]), [len(text) // 2])

    def _windows(self, bases, count):
        """Windows of both strands, spread evenly over them, one-hot; no base is around them."""
        padded = [
            np.pad(strand, CONTEXT, constant_values=-1) for strand in (bases, 3 - bases[::-1])
        ]
        starts = np.linspace(0, len(bases) - WINDOW, -(-count // 2)).astype(int)
        windows = [
            strand[start : start + WINDOW + 2 * CONTEXT] for start in starts for strand in padded
        ]
        table = np.eye(len(BASES) + 1, len(BASES), dtype="float32")  # -1: the last row, of zeros
        return table[np.stack(windows)[:count]]
