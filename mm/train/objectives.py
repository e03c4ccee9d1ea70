"""Which objective each stage has."""

from __future__ import annotations

from typing import Any

from mm.train.config import TrainConfig
from mm.train.contrastive import Contrastive
from mm.train.grounding import Grounding
from mm.train.masked_speech import MaskedSpeech
from mm.train.mel_prediction import MelPrediction
from mm.train.naming import Naming
from mm.train.next_token import NextToken
from mm.train.normalizing import Normalizing
from mm.train.objective import Objective
from mm.train.prosody_prediction import ProsodyPrediction
from mm.train.spelling import Aligning, Spelling
from mm.train.start import load_model
from mm.train.vocoding import Vocoding


def make_objective(config: TrainConfig) -> Objective[Any, Any]:
    """Builds the stage's model, on the CPU and in FP32."""
    match config.stage_spec.loss:
        case "contrastive":
            return Contrastive(config)
        case "best-rq":
            return MaskedSpeech(config)
        case "ctc":
            return Spelling(config)
        case "token-ctc":
            return Aligning(config, load_model(config))
        case "caption-words":
            return Naming(config, load_model(config))
        case "facts":
            return Grounding(config, load_model(config))
        case "next-token":
            return NextToken(config)
        case "rules":
            return Normalizing(config)
        case "prosody":
            return ProsodyPrediction(config)
        case "mel":
            return MelPrediction(config)
        case "waveform":
            return Vocoding(config)
