"""A warm start of the speech encoder on transcripts, for small budgets; and the probe of its pre-training.

python -m mm.train.speech_ctc [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("speech-ctc")
