"""Pre-training of the temporal aggregator and the video blocks, beside frozen eyes and language model (section 7.4).

python -m mm.train.video [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("video")
