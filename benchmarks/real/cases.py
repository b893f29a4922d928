"""The models of the study, by name."""

from real.basic_pitch import BasicPitch
from real.deepcut import Deepcut
from real.deeplc import DeepLC
from real.ethnicolr import Ethnicolr
from real.g2p_en import G2P
from real.spliceai import SpliceAI
from real.textgenrnn import TextGenRNN

CASES = {
    case.name: case for case in (SpliceAI, DeepLC, Deepcut, TextGenRNN, Ethnicolr, BasicPitch, G2P)
}
