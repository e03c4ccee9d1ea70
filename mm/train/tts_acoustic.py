"""The acoustic model: phones and their prosody to log-mel frames and pitch.

python -m mm.train.tts_acoustic [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("tts-acoustic")
