"""The prosody model: how long, how high and how loud each phone is.

python -m mm.train.tts_prosody [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("tts-prosody")
