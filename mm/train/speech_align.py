"""A warm start of encoder and speech adapter on transcripts, in the language model's own embeddings, for small budgets.

python -m mm.train.speech_align [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("speech-align")
