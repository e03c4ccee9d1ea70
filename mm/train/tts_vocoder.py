"""The vocoder: log-mel frames and pitch to samples.

python -m mm.train.tts_vocoder [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("tts-vocoder")
