"""A warm start of the temporal aggregator on the words of captions, without the language model, for small budgets.

python -m mm.train.video_align [--config X.yaml] key.sub=value ...
"""

from mm.train.launch import main

if __name__ == "__main__":
    main("video-align")
