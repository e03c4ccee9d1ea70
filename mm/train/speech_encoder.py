"""BEST-RQ pre-training of the speech encoder on recordings alone (section 8.3.1).

python -m mm.train.speech_encoder [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("speech-encoder")
