"""When a peptide leaves a chromatography column: convolutions over its atoms, and dense layers."""

import csv
import gzip

import keras
import numpy as np
from legacy import load_legacy_h5, replace_activation

from real.case import Case, correlation, split

ATOMS = "CHNOSP"
AMINO_ACIDS = "KRPTNAQVSGILCMHFYWED"  # in the order of the model's one-hot input
GLYCINE = (2, 3, 1, 1, 0, 0)  # atoms of the residue that the package's table counts from
LENGTH, ENDS = 60, 4


@keras.saving.register_keras_serializable("real_models")
def capped_leaky_relu(x):
    """The activation of DeepLC, which its files call `<lambda>`."""
    return keras.ops.minimum(keras.ops.leaky_relu(x, 0.1), 20.0)


class DeepLC(Case):
    """The smallest of three models, on peptides of yeast that are not modified."""

    name = "deeplc"
    requirement = "deeplc==2.2.38"
    metric = "correlation with measured retention times"
    also = "correlation with the original"
    calibration = 3000  # more than the inputs of its widest layer

    def load(self):
        name = "full_hc_PXD005573_mcp_8c22d89667368f2f02ad996469ba157e.hdf5"
        path = self.folder / "deeplc/mods" / name
        return load_legacy_h5(path, [replace_activation("<lambda>", capped_leaky_relu)])

    def training_inputs(self, count):
        peptides, _ = self._peptides()
        return self._features([sequence for sequence, _ in peptides[:count]])

    def test(self):
        _, peptides = self._peptides()
        sequences, times = zip(*peptides, strict=True)
        return self._features(sequences), np.array(times)

    def scores(self, outputs, original, labels):
        return correlation(outputs, labels), correlation(outputs, original)

    def _peptides(self):
        with gzip.open(self.sources.real("peptides.csv.gz"), "rt", newline="") as file:
            rows = [(row["seq"], float(row["tr"])) for row in csv.DictReader(file)]
        return split(rows, test=3000)

    def _features(self, sequences):
        """For each peptide: atoms of residues, of pairs, of all and of the ends; one-hot."""
        with (self.folder / "deeplc/aa_comp_rel.csv").open(newline="") as file:
            table = {
                row["aa"]: np.add([int(row.get(atom, 0)) for atom in ATOMS], GLYCINE)
                for row in csv.DictReader(file)
            }
        atoms = np.zeros((len(sequences), LENGTH, len(ATOMS)), "float32")
        kinds = np.zeros((len(sequences), LENGTH, len(AMINO_ACIDS)), "float32")
        ends = np.zeros((len(sequences), 2 * ENDS, len(ATOMS)), "float32")
        lengths = np.zeros((len(sequences), 1), "float32")
        for number, sequence in enumerate(sequences):
            sequence = sequence[:LENGTH]
            counts = [table[residue] for residue in sequence]
            atoms[number, : len(sequence)] = counts
            kinds[number, range(len(sequence)), [*map(AMINO_ACIDS.index, sequence)]] = 1
            ends[number] = counts[:ENDS] + counts[-ENDS:]
            lengths[number] = len(sequence)
        pairs = atoms.reshape(len(atoms), LENGTH // 2, 2, -1).sum(axis=2)
        whole = [atoms.sum(axis=1), lengths, ends.reshape(len(ends), -1)]
        return [atoms, pairs, np.concatenate(whole, axis=1), kinds]
