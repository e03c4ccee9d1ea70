"""The text normaliser: which rule says each written token.

python -m mm.train.tts_normalizer [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("tts-normalizer")
